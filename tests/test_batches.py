"""Batches by step number, and codes on disk: exact resume, the same with workers, nothing lost without a word."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_fast.data import Batches, BrokenSample, EncodedPairs, Pair, encoded, write_encoded
from dalle_fast.data.augment import augment_dvae
from dalle_fast.data.loader import collate, shuffled


class Pictures:
    """n pictures of which some are broken; picture i is captioned i."""

    def __init__(self, n: int, broken: tuple[int, ...] = ()) -> None:
        self.n = n
        self.broken = broken

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Pair:
        if index in self.broken:
            raise BrokenSample(f"picture {index}", "torn")
        return Pair(np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8), str(index))


def transform(pair: Pair, rng: np.random.Generator) -> dict[str, object]:
    return {"image": augment_dvae(pair.image, 16, rng), "caption": pair.caption, "seed": rng.integers(2**63)}


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]


# ---------------------------------------------------------------------------------------------- order


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 600), seed=st.integers(0, 2**64), epoch=st.integers(0, 10**9))
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(shuffled(i, n, seed, epoch) for i in range(n)) == list(range(n))


def test_permutations_are_well_mixed() -> None:
    """As many fixed points and ascents as random permutations have, and another order every epoch and seed."""
    n = 1000
    orders = [[shuffled(i, n, seed, epoch) for i in range(n)] for seed in range(5) for epoch in range(5)]
    assert len({tuple(order) for order in orders}) == 25
    fixed = sum(value == i for order in orders for i, value in enumerate(order))
    assert fixed <= 50  # 25 expected, standard deviation 5
    for order in orders:
        ascents = sum(a < b for a, b in itertools.pairwise(order))
        assert ascents == pytest.approx(n / 2, abs=5 * (n / 12) ** 0.5)


def test_huge_corpora_need_no_memory() -> None:
    assert len({shuffled(i, 10**12, 0, 0) for i in range(100)}) == 100


def test_epochs_run_on_inside_a_batch() -> None:
    batches = Batches(Pictures(10), 4, transform, seed=0)
    seen = [caption for step in range(5) for caption in batches.batch_at(step)["caption"]]
    assert sorted(seen[:10], key=int) == sorted(seen[10:], key=int) == [str(i) for i in range(10)]
    assert seen[:10] != seen[10:]


# ---------------------------------------------------------------------------------------------- resume


def test_a_batch_is_images_and_lists() -> None:
    batch = Batches(Pictures(10), 4, transform, seed=0).batch_at(0)
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].is_contiguous()
    assert batch["image"].min() >= 0
    assert 0.5 < batch["image"].max() <= 1
    assert batch["seed"].dtype == torch.int64
    assert isinstance(batch["caption"], list)


def test_resume_is_exact() -> None:
    run = list(itertools.islice(Batches(Pictures(10, broken=(3,)), 4, transform, seed=5).iterate(), 12))
    resumed = Batches(Pictures(10, broken=(3,)), 4, transform, seed=5).iterate(start_step=7)
    for expected, batch in zip(run[7:], resumed, strict=False):
        assert_same(batch, expected)


def test_the_seed_matters() -> None:
    first, second = (Batches(Pictures(10), 4, transform, seed).batch_at(0) for seed in (0, 1))
    assert not torch.equal(first["seed"], second["seed"])


def test_workers_change_nothing() -> None:
    """Neither the batches, nor the count of what was left out, nor torch's global generator."""
    alone = Batches(Pictures(10, broken=(3, 4)), 4, transform, seed=1)
    helped = Batches(Pictures(10, broken=(3, 4)), 4, transform, seed=1, workers=2)
    state = torch.get_rng_state()
    for expected, batch in zip(itertools.islice(alone.iterate(2), 9), helped.iterate(2), strict=False):
        assert_same(batch, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(alone.skipped.values()) > 2
    assert helped.skipped == alone.skipped


# ---------------------------------------------------------------------------------------------- broken samples


def test_broken_samples_are_dropped_and_reported(tmp_path: Path) -> None:
    batches = Batches(Pictures(8, broken=(2, 5)), 4, transform, seed=0)
    sizes = [len(batches.batch_at(step)["caption"]) for step in range(4)]  # two epochs
    assert sum(sizes) == 12
    assert batches.skipped == Counter({("picture 2", "torn"): 2, ("picture 5", "torn"): 2})
    batches.write_report(tmp_path / "report.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert lines == [{"name": f"picture {i}", "reason": "torn", "count": 2} for i in (2, 5)]


def test_the_next_batch_stands_in_for_a_broken_one() -> None:
    batches = Batches(Pictures(6, broken=(0, 1, 2)), 1, transform, seed=0)
    good = [str(i) for i in (3, 4, 5)]
    assert all(batches.batch_at(step)["caption"][0] in good for step in range(12))


def test_nothing_readable_is_an_error() -> None:
    batches = Batches(Pictures(3, broken=(0, 1, 2)), 2, transform, seed=0)
    with pytest.raises(ValueError, match="expected at least one readable sample"):
        batches.batch_at(0)


def test_what_the_source_skipped_is_counted() -> None:
    pairs = Pictures(3)
    pairs.skipped = [("a.png", "no caption")]  # type: ignore[attr-defined]
    assert Batches(pairs, 2, transform, seed=0).skipped == Counter({("a.png", "no caption"): 1})


def test_bad_arguments() -> None:
    for arguments, name in (((Pictures(0), 1), "pairs"), ((Pictures(1), 0), "batch_size")):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            Batches(*arguments, transform, seed=0)
    with pytest.raises(ValueError, match="seed and workers: expected 0 or more, got -1 and 0"):
        Batches(Pictures(1), 1, transform, seed=-1)
    with pytest.raises(ValueError, match="step: expected 0 or more, got -1"):
        Batches(Pictures(1), 1, transform, seed=0).batch_at(-1)


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


# ---------------------------------------------------------------------------------------------- encoded


def codes_and_captions(n: int) -> list[tuple[np.ndarray, str]]:
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 65536, (3, 4)), f"caption {i}\n\u2028 ü") for i in range(n)]


def test_encoded_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "SHARD_SIZE", 4)
    samples = codes_and_captions(10)
    assert write_encoded(tmp_path / "codes", iter(samples), fingerprint="abc") == 10
    assert [path.name for path in tmp_path.iterdir()] == ["codes"]
    pairs = EncodedPairs(tmp_path / "codes")
    assert (len(pairs), pairs.grid, pairs.fingerprint) == (10, (3, 4), "abc")
    for i, (codes, caption) in enumerate(samples):
        assert pairs[i].codes.dtype == np.int64
        assert np.array_equal(pairs[i].codes, codes)
        assert pairs[i].caption == caption
    with pytest.raises(IndexError):
        pairs[10]
    batch = Batches(pairs, 5, lambda pair, _: pair._asdict(), seed=0).batch_at(0)
    assert batch["codes"].shape == (5, 3, 4)


def test_changed_encoded_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    write_encoded(folder, codes_and_captions(3), fingerprint="abc")
    for name in ("codes-00000.npy", "captions.jsonl", "meta.json"):
        whole = (folder / name).read_bytes()
        for content in (whole[:-20], b"x" + whole[1:]):
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match="encoded pairs: expected"):
                EncodedPairs(folder)
        (folder / name).unlink()
        with pytest.raises(ValueError, match="encoded pairs: expected"):
            EncodedPairs(folder)
        (folder / name).write_bytes(whole)
    assert len(EncodedPairs(folder)) == 3


def test_failed_writes_leave_nothing(tmp_path: Path) -> None:
    good = codes_and_captions(2)
    bad_samples = {
        "at least one": [],
        "expected integers": [*good, (np.zeros((2, 2), np.int64), "another grid")],
        "expected integers.*float": [(np.zeros((3, 4)), "floats")],
        "0 to 65535": [(np.full((3, 4), 65536), "too large")],
    }
    for match, samples in bad_samples.items():
        with pytest.raises(ValueError, match=match):
            write_encoded(tmp_path / "codes", samples, fingerprint="abc")
        assert list(tmp_path.iterdir()) == []
    write_encoded(tmp_path / "codes", good, fingerprint="abc")
    with pytest.raises(ValueError, match="output folder: expected a new or empty one"):
        write_encoded(tmp_path / "codes", good, fingerprint="abc")
    assert len(EncodedPairs(tmp_path / "codes")) == 2
