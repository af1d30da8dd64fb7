"""Batches by step number, and codes on disk: exact resume, the same with workers, nothing lost without a word."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_fast.data import Batches, BrokenSample, Pair, Skipped
from dalle_fast.data.augment import augment_dvae
from dalle_fast.data.batches import collate
from dalle_fast.data.shuffle import mixed, round_keys, shuffled


class Images:
    """n images of which some are broken; image i is captioned i."""

    def __init__(self, n: int, broken: tuple[int, ...] = ()) -> None:
        self.n = n
        self.broken = broken

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Pair:
        if index in self.broken:
            raise BrokenSample(f"image {index}", "torn")
        return Pair(np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8), str(index))


def transform(pair: Pair, rng: np.random.Generator) -> dict[str, object]:
    return {"image": augment_dvae(pair.image, 16, rng), "caption": pair.caption, "seed": rng.integers(2**63)}


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]


# ---------------------------------------------------------------------------------------------- order


@settings(max_examples=60)
@given(n=st.integers(1, 600), seed=st.integers(0, 2**64), epoch=st.integers(0, 10**9))
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert np.sort(shuffled(np.arange(n), n, seed, epoch)).tolist() == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 4093, 4095, 4096, 4097, 65521, 2**16, 2**16 + 1])
def test_permutations_of_any_size(n: int) -> None:
    for epoch in range(3):
        assert np.array_equal(np.sort(shuffled(np.arange(n), n, 1, epoch)), np.arange(n))


def unshuffled(values: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The inverse of ``shuffled``: the rounds backwards."""
    keys = round_keys(seed, epoch)
    bits = max(2, (n - 1).bit_length())
    low = np.uint64(bits // 2)
    masks = [(np.uint64(1) << width) - np.uint64(1) for width in (np.uint64(bits) - low, low)]

    def backwards(values: np.ndarray) -> np.ndarray:
        left, right = values >> low, values & masks[1]
        for i in reversed(range(len(keys))):
            left, right = right ^ (mixed(left + keys[i]) & masks[i % 2]), left
        return left << low | right

    result = backwards(values.astype(np.uint64))
    while (outside := result >= n).any():
        result[outside] = backwards(result[outside])
    return result.astype(np.int64)


@pytest.mark.parametrize("n", [1000, 2**20, 250_000_000, 10**12, 2**62])
def test_permutations_have_an_inverse(n: int) -> None:
    """A map of a range to itself that has an inverse is a permutation; large ranges are sampled."""
    indices = np.random.default_rng(0).integers(n, size=20_000)
    there = shuffled(indices, n, 7, 3)
    assert there.min() >= 0 and there.max() < n
    assert np.array_equal(unshuffled(there, n, 7, 3), indices)
    assert np.array_equal(shuffled(unshuffled(indices, n, 7, 3), n, 7, 3), indices)


def test_permutations_are_well_mixed() -> None:
    """As many fixed points and ascents as random permutations have, and another order every epoch and seed."""
    n = 1000
    orders = [shuffled(np.arange(n), n, seed, epoch) for seed in range(5) for epoch in range(5)]
    assert len({tuple(order) for order in orders}) == 25
    fixed = sum((order == np.arange(n)).sum() for order in orders)
    assert fixed <= 50  # 25 expected, standard deviation 5
    for order in orders:
        assert (np.diff(order) > 0).sum() == pytest.approx(n / 2, abs=5 * (n / 12) ** 0.5)


def test_neighbours_are_torn_apart() -> None:
    """In 250M pairs, neighbours and multiples of a power of two go to places, and to shards, as good as random."""
    n, count, shards = 250_000_000, 40_000, 100
    for indices in (np.arange(count), np.arange(count) << 12, n - 1 - np.arange(count)):
        there = shuffled(indices, n, 0, 0)
        in_shard = np.bincount(there // (n // shards), minlength=shards)
        chi_square = ((in_shard - count / shards) ** 2 / (count / shards)).sum()
        assert chi_square < 160  # 99 expected, standard deviation 14
        order = there.argsort().argsort()
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.025  # standard deviation 0.005


def test_indices_outside_are_refused() -> None:
    for indices, n in (([-1, 0], 3), ([0, 3], 3), ([0], 0)):
        with pytest.raises(ValueError, match=rf"indices: expected 0 to {n - 1}, got {indices[0]} to {indices[-1]}"):
            shuffled(np.array(indices), n, 0, 0)


def test_epochs_run_on_inside_a_batch() -> None:
    batches = Batches(Images(10), 4, transform, seed=0)
    seen = [caption for step in range(5) for caption in batches.batch_at(step)["caption"]]
    assert sorted(seen[:10], key=int) == sorted(seen[10:], key=int) == [str(i) for i in range(10)]
    assert seen[:10] != seen[10:]


# ---------------------------------------------------------------------------------------------- ranks


class Numbers:
    """A corpus of its own indices."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


def index_and_draw(index: int, rng: np.random.Generator) -> dict[str, object]:
    return {"index": index, "draw": rng.integers(2**63)}


def stream(n: int, batch_size: int, steps: range, ranks: int) -> list[tuple[int, int]]:
    """The samples of some steps, in the order of the ranks, and their random draws."""
    parts = [Batches(Numbers(n), batch_size, index_and_draw, 3, rank=rank, ranks=ranks) for rank in range(ranks)]
    batches = [part.batch_at(step) for step in steps for part in parts]
    assert all(len(batch["index"]) == batch_size // ranks for batch in batches)
    return [pair for batch in batches for pair in zip(batch["index"].tolist(), batch["draw"].tolist(), strict=True)]


@settings(max_examples=40)
@given(
    n=st.integers(1, 70),
    share=st.integers(1, 4),
    ranks=st.integers(1, 6),
    later_ranks=st.integers(1, 6),
    resumed_at=st.integers(0, 5),
)
def test_each_sample_once_an_epoch(n: int, share: int, ranks: int, later_ranks: int, resumed_at: int) -> None:
    """Also when the ranks become others between two steps; and the ranks have no say in anything."""
    batch_size = share * math.lcm(ranks, later_ranks)
    steps = max(resumed_at + 1, -(-3 * n // batch_size))
    samples = stream(n, batch_size, range(resumed_at), ranks)
    samples += stream(n, batch_size, range(resumed_at, steps), later_ranks)
    assert samples == stream(n, batch_size, range(steps), 1)
    indices = [index for index, _ in samples]
    for epoch in range(len(indices) // n):
        assert sorted(indices[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert len({draw for _, draw in samples}) == len(samples)


def test_each_sample_once_an_epoch_with_workers() -> None:
    """Ranks and workers together, resumed in the middle of an epoch on other ranks and workers."""
    n, batch_size = 30, 6
    seen: list[int] = []
    for ranks, workers, steps in ((2, 2, range(3)), (3, 1, range(3, 10))):
        parts = [
            Batches(Numbers(n), batch_size, index_and_draw, 0, workers, rank, ranks).iterate(steps.start)
            for rank in range(ranks)
        ]
        for _ in steps:
            seen += [index for part in parts for index in next(part)["index"].tolist()]
    assert sorted(seen[:n]) == sorted(seen[n : 2 * n]) == list(range(n))
    assert seen[:n] != seen[n : 2 * n]


# ---------------------------------------------------------------------------------------------- resume


def test_a_batch_is_images_and_lists() -> None:
    batch = Batches(Images(10), 4, transform, seed=0).batch_at(0)
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].is_contiguous()
    assert batch["image"].min() >= 0
    assert 0.5 < batch["image"].max() <= 1
    assert batch["seed"].dtype == torch.int64
    assert isinstance(batch["caption"], list)


def test_resume_is_exact() -> None:
    run = list(itertools.islice(Batches(Images(10, broken=(3,)), 4, transform, seed=5).iterate(), 12))
    resumed = Batches(Images(10, broken=(3,)), 4, transform, seed=5).iterate(start_step=7)
    for expected, batch in zip(run[7:], resumed, strict=False):
        assert_same(batch, expected)


def test_the_seed_matters() -> None:
    first, second = (Batches(Images(10), 4, transform, seed).batch_at(0) for seed in (0, 1))
    assert not torch.equal(first["seed"], second["seed"])


def test_workers_change_nothing() -> None:
    """Neither the batches, nor the counts of skipped samples, nor torch's global generator."""
    alone = Batches(Images(10, broken=(3, 4)), 4, transform, seed=1)
    helped = Batches(Images(10, broken=(3, 4)), 4, transform, seed=1, workers=2)
    state = torch.get_rng_state()
    for expected, batch in zip(itertools.islice(alone.iterate(2), 9), helped.iterate(2), strict=False):
        assert_same(batch, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(alone.skipped.values()) > 2
    assert helped.skipped == alone.skipped


# ---------------------------------------------------------------------------------------------- broken samples


def test_broken_samples_are_replaced_and_reported(tmp_path: Path) -> None:
    """By others, the same for any number of ranks; those that are not broken are all there."""
    images = Images(8, broken=(2, 5))
    images.skipped = [Skipped("a.png", "no caption")]  # type: ignore[attr-defined]
    batches = Batches(images, 4, transform, seed=0)
    ranks = [Batches(images, 4, transform, seed=0, rank=rank, ranks=2) for rank in range(2)]
    seen: list[str] = []
    for step in range(4):  # two epochs
        batch = batches.batch_at(step)
        parts = [rank.batch_at(step) for rank in ranks]
        assert torch.equal(batch["image"], torch.cat([part["image"] for part in parts]))
        seen += batch["caption"]
    assert len(seen) == 16
    assert all(seen[:8].count(str(i)) >= 1 <= seen[8:].count(str(i)) for i in (0, 1, 3, 4, 6, 7))
    assert batches.skipped == ranks[0].skipped + ranks[1].skipped
    assert {name: count >= 2 for (name, _), count in batches.skipped.items()} == {"image 2": True, "image 5": True}
    batches.write_report(tmp_path / "report.jsonl")
    ranks[0].write_report(tmp_path / "report of ranks.jsonl", others=[ranks[1].skipped])
    lines = (tmp_path / "report.jsonl").read_text()
    assert (tmp_path / "report of ranks.jsonl").read_text() == lines
    assert [json.loads(line) for line in lines.splitlines()] == [
        {"name": "a.png", "reason": "no caption", "count": 1},
        *({"name": f"image {i}", "reason": "torn", "count": batches.skipped[f"image {i}", "torn"]} for i in (2, 5)),
    ]


def test_nothing_readable_is_an_error() -> None:
    batches = Batches(Images(3, broken=(0, 1, 2)), 2, transform, seed=0)
    with pytest.raises(ValueError, match=r"got 1000 broken in a row, the last image \d: torn"):
        batches.batch_at(0)


def test_bad_arguments() -> None:
    for arguments, name in (((Images(0), 1), "pairs"), ((Images(1), 0), "batch_size")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            Batches(*arguments, transform, seed=0)
    for ranks in (0, 3):
        with pytest.raises(ValueError, match=f"batch_size: expected a multiple of the {ranks} ranks, got 4"):
            Batches(Images(1), 4, transform, seed=0, ranks=ranks)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank: expected 0 to 1, got {rank}"):
            Batches(Images(1), 4, transform, seed=0, rank=rank, ranks=2)
    with pytest.raises(ValueError, match="seed and workers: expected 0 or more, got -1 and 0"):
        Batches(Images(1), 1, transform, seed=-1)
    with pytest.raises(ValueError, match="step: expected 0 or more, got -1"):
        Batches(Images(1), 1, transform, seed=0).batch_at(-1)


def test_collate_keeps_types() -> None:
    values = {"f": 0.5, "i": 2, "codes": np.zeros((2, 2), np.int64), "t": torch.ones(3), "name": "x"}
    batch = collate([values, values])
    assert {key: value.dtype for key, value in batch.items() if key != "name"} == {
        "f": torch.float64,
        "i": torch.int64,
        "codes": torch.int64,
        "t": torch.float32,
    }
    assert batch["codes"].shape == (2, 2, 2)
    assert batch["name"] == ["x", "x"]
