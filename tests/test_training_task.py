"""Samples of each training: images, captions and codes, a pure function of the seed and the step."""

import json
import re

import numpy as np
import pytest
import torch
from helpers.training import CLIP, DALLE, DVAE, KINDS, codes, pairs, same, settings, task, tokenizer

from dalle_fast.data.codes import EncodedPair
from dalle_fast.data.pairs import BrokenSample, Pair
from dalle_fast.models import DiscreteVAE
from dalle_fast.tokenizer import Tokenizer
from dalle_fast.training import fit, train_clip, train_dalle, train_dvae, train_tokenizer
from dalle_fast.training.clip import CLIPTask
from dalle_fast.training.dalle import DALLETask
from dalle_fast.training.dvae import DVAETask

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_step_is_a_function_of_seed_and_step(kind):
    def loss_of(step: int, **changes) -> torch.Tensor:
        some = task(kind, settings(kind, **changes))
        return some.loss(some.model, next(some.batches(step)), step)[0].detach()

    assert torch.equal(loss_of(5), loss_of(5))
    assert not torch.equal(loss_of(5), loss_of(6))
    assert not torch.equal(loss_of(5), loss_of(5, seed=4))


def test_workers_change_nothing():
    plain, forked = (task("dalle", settings("dalle", workers=workers)).batches(2) for workers in (0, 2))
    for _ in range(3):
        assert same(next(plain), next(forked))


def test_images_are_encoded_as_they_come():
    torch.manual_seed(0)
    dvae = DiscreteVAE(DVAE)
    config = settings("dalle", bpe_dropout=False, caption_dropout=0.0)
    images = [
        Pair(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8), f"picture {i}") for i in range(10)
    ]
    pixels = torch.from_numpy(np.stack([pair.image for pair in images])).permute(0, 3, 1, 2) / 255
    encoded = [EncodedPair(c, p.caption) for c, p in zip(dvae.encode(pixels).numpy(), images, strict=True)]
    on_the_fly = DALLETask(images, images[:4], tokenizer(), DALLE, config, dvae)
    cached = DALLETask(encoded, encoded[:4], tokenizer(), DALLE, config, None)
    model = cached.model
    for step in (0, 3):
        first = on_the_fly.loss(model, next(on_the_fly.batches(step)), step)
        second = cached.loss(model, next(cached.batches(step)), step)
        assert same(list(first), list(second))
    for (first, _), (second, _) in zip(on_the_fly.validation(), cached.validation(), strict=True):
        assert same(on_the_fly.evaluate(model, first), cached.evaluate(model, second))


def test_captions_are_dropped_and_cut_at_random():
    texts = tokenizer()
    empty = texts.encode([""])[0]
    plain = {tuple(texts.encode([f"picture {i}"])[0].tolist()) for i in range(10)}

    def rows(**changes) -> list[list[int]]:
        some = DALLETask(codes(), None, texts, DALLE, settings("dalle", batch_size=400, **changes), None)
        return next(some.batches(0))["text"].tolist()

    dropped = rows(caption_dropout=0.3, bpe_dropout=False)
    assert np.mean([row == empty.tolist() for row in dropped]) == pytest.approx(0.3, abs=0.07)
    assert {tuple(row) for row in dropped} == plain | {tuple(empty.tolist())}
    cut = rows(caption_dropout=0.0, bpe_dropout=True)
    assert {tuple(row) for row in cut} > plain
    assert set(texts.decode(torch.tensor([row for row in cut if row[-1] >= texts.vocab_size]))) == {
        f"picture {i}" for i in range(10)
    }


def test_validation_is_spread_over_the_corpus_and_the_same_each_time():
    some = DVAETask(pairs(), pairs(100), DVAE, settings("dvae", val_samples=6, batch_size=4))
    first, second = list(some.validation()), list(some.validation())
    assert same(first, second)
    assert [size for _, size in first] == [4, 2]
    expected = DVAETask(pairs(), [pairs(100)[i] for i in (0, 16, 33, 50, 66, 83)], DVAE, settings("dvae", batch_size=4))
    assert same(first, list(expected.validation()))
    assert list(DVAETask(pairs(), None, DVAE, settings("dvae")).validation()) == []


class Torn(list):
    """Pairs of which some cannot be read."""

    def __getitem__(self, index: int) -> Pair:
        if index % 3 == 1:
            raise BrokenSample(f"picture {index}", "torn")
        return super().__getitem__(index)


def test_broken_samples_are_left_out_and_reported(tmp_path):
    config = settings("dvae", steps=3, init_codes=False)
    _, metrics = train_dvae(Torn(pairs()), Torn(pairs(6)), DVAE, config, tmp_path)
    assert np.isfinite(metrics["val_loss"])
    report = [json.loads(line) for line in (tmp_path / "dvae" / "skipped.jsonl").read_text().splitlines()]
    assert {line["name"] for line in report} == {"picture 1", "picture 4", "picture 7"}
    assert all(line["reason"] == "torn" for line in report)


def test_codes_start_at_the_data():
    spread = [task("dvae", settings("dvae", init_codes=init)).model for init in (False, True)]
    images = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    random, placed = (len(model.encode(images).unique()) for model in spread)
    assert placed > random


def test_the_three_models_learn_something(tmp_path):
    """A corpus of two images, black and white, is learnt within a few steps."""
    both = [Pair(np.full((8, 8, 3), value, np.uint8), name) for value, name in ((0, "black"), (255, "white"))] * 4
    texts = train_tokenizer((pair.caption for pair in both), tmp_path, vocab_size=270, text_len=6)
    assert torch.equal(Tokenizer.load(tmp_path / "tokenizer.json").encode("white"), texts.encode("white"))
    common = {"steps": 120, "batch_size": 8, "log_every": 60, "val_every": 60, "ema_decay": 0.8, "ema_every": 1}
    # From a random start: there are fewer patches than codes, so k-means has nothing to give.
    plain = {"lr_steps": 120, "encoder_lr": 1.0, "beta_end": 0.1, "init_codes": False}
    dvae, result = train_dvae(both, both, DVAE, settings("dvae", **common, **plain), tmp_path)
    assert result["val_mse"] < 0.02
    _, result = train_clip(both, both, texts, CLIP, settings("clip", **common), tmp_path)
    assert result["val_accuracy"] == 1.0
    config = settings("dalle", **common, bpe_dropout=False, caption_dropout=0.0, plateau_window=1000)
    _, result = train_dalle(both, both, texts, DALLE, config, tmp_path, dvae)
    assert result["val_image_loss"] < 0.3 * np.log(DALLE.image_vocab)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tokenizer.json", "dvae", "clip", "dalle", "dvae.safetensors", "clip.safetensors", "dalle.safetensors",
    }  # fmt: skip


def test_parts_that_do_not_fit_are_refused(tmp_path):
    other = Tokenizer.train(["a"], vocab_size=300, text_len=6)
    with pytest.raises(ValueError, match="text_vocab: expected the tokenizer's 300, got 270"):
        train_clip(pairs(), None, other, CLIP, settings("clip"), tmp_path)
    with pytest.raises(ValueError, match="dvae: expected one"):
        train_dalle(pairs(), None, tokenizer(), DALLE, settings("dalle"), tmp_path)
    with pytest.raises(ValueError, match="pairs: expected images, got codes"):
        train_clip(codes(), None, tokenizer(), CLIP, settings("clip"), tmp_path)
    small = DiscreteVAE(DVAE.__class__(image_size=8, vocab_size=8, n_hid=8, n_init=8, groups=(1, 2), n_blk_per_group=1))
    with pytest.raises(ValueError, match="of 8 codes"):
        train_dalle(pairs(), None, tokenizer(), DALLE, settings("dalle"), tmp_path, small)


@pytest.mark.parametrize(
    ("given", "got"),
    [(np.full((4, 4), 16), "16 to 16"), (np.full((4, 4), -1), "-1 to -1"), (np.zeros((3, 4), np.int64), "[3, 4]")],
)
def test_codes_that_the_model_cannot_read_are_refused_before_they_reach_it(given, got):
    config, fits = settings("dalle"), codes()
    spoiled = [EncodedPair(given, pair.caption) for pair in fits]
    message = re.escape("codes: expected [4, 4] with values in [0, 16), got ") + f".*{re.escape(got)}"
    with pytest.raises(ValueError, match=message):
        next(DALLETask(spoiled, None, tokenizer(), DALLE, config, None).batches(0))
    with pytest.raises(ValueError, match=message):
        next(DALLETask(fits, spoiled, tokenizer(), DALLE, config, None).validation())


# ---------------------------------------------------------------------------------------------- broken held-out samples


class Broken(list):
    """Pairs of which some cannot be read."""

    def __init__(self, some, broken) -> None:
        super().__init__(some)
        self.broken = set(broken)

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenSample(f"val/{index}.png", "torn")
        return super().__getitem__(index)


def held_out(kind: str, broken, config=None):
    config = config or settings(kind)
    if kind == "dalle":
        return DALLETask(codes(), Broken(codes(6), broken), tokenizer(), DALLE, config, None)
    if kind == "clip":
        return CLIPTask(pairs(), Broken(pairs(6), broken), tokenizer(), CLIP, config)
    return DVAETask(pairs(), Broken(pairs(6), broken), DVAE, config)


def report(out) -> dict[str, int]:
    return {e["name"]: e["count"] for e in map(json.loads, (out / "skipped.jsonl").read_text().splitlines())}


@pytest.mark.parametrize("kind", KINDS)
def test_broken_held_out_samples_are_reported(kind, tmp_path):
    config = settings(kind, steps=6, val_every=3)
    _, metrics = fit(held_out(kind, (0, 2, 5), config), config, tmp_path)
    assert np.isfinite(metrics["val_loss"])
    assert report(tmp_path / kind) == {f"val/{i}.png": 2 for i in (0, 2, 5)}  # validations
    fit(held_out(kind, (0, 2, 5), config), settings(kind, steps=9, val_every=3), tmp_path)
    assert report(tmp_path / kind) == {f"val/{i}.png": 3 for i in (0, 2, 5)}  # a resumed run counts on


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_data_of_which_nothing_can_be_read_are_refused(kind):
    with pytest.raises(
        ValueError, match=r"val: expected readable samples, got 6 broken ones, such as val/0\.png: torn"
    ):
        held_out(kind, range(6))


def test_a_resumed_run_keeps_the_report_of_the_first(tmp_path):
    def run(steps: int) -> None:
        config = settings("dvae", steps=steps, init_codes=False)
        fit(DVAETask(Broken(pairs(), (1, 4)), None, DVAE, config), config, tmp_path)

    run(4)
    first = report(tmp_path / "dvae")
    assert sum(first.values()) >= 2
    with (tmp_path / "dvae" / "skipped.jsonl").open("ab") as file:
        file.write(b'\xff\n{"name": 1}\n[[\n' + b"[" * 100_000 + b"\n")
    run(5)
    assert all(report(tmp_path / "dvae")[name] >= count for name, count in first.items())
    run(12)
    assert all(report(tmp_path / "dvae")[name] > count for name, count in first.items())


def test_clip_needs_two_samples_to_tell_apart():
    with pytest.raises(ValueError, match="batch_size: expected 2 or more, to tell one from another, got 1"):
        settings("clip", batch_size=1)
    with pytest.raises(ValueError, match="val: expected 2 samples or more, to tell one from another, got 1"):
        CLIPTask(pairs(), pairs(1), tokenizer(), CLIP, settings("clip"))


# ---------------------------------------------------------------------------------------------- settings

NAN, INF = float("nan"), float("inf")
EVERY = {
    "warmup_steps": [-5], "lr": [INF, NAN, -1.0], "weight_decay": [NAN, -0.1], "clip_norm": [NAN, INF, -1.0],
    "eps": [0.0, -1e-8, NAN], "betas": [(1.0, 0.9), (0.9, NAN), (-0.1, 0.9), (0.9, 1.5)], "ema_decay": [NAN, 1.0, -0.1],
    "seed": [-1, 2**63, 2**70], "workers": [-1], "steps": [0], "batch_size": [0], "val_samples": [0],
}  # fmt: skip
OWN = {
    "dvae": {
        "beta": [NAN, -1.0, INF], "beta_end": [NAN], "tau": [0.0, -1.0, NAN], "tau_end": [0.0, NAN],
        "lr_end": [-1.0, NAN], "encoder_lr": [-1.0, NAN, INF], "grain": [-0.1, NAN, INF], "lr_steps": [-1],
        "tau_steps": [-1], "beta_steps": [-1],
    },
    "clip": {"batch_size": [1]},
    "dalle": {
        "caption_dropout": [NAN, 1.5, -0.1], "plateau_window": [0], "plateau_patience": [0, -1], "powersgd_rank": [0],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_settings_that_cannot_be_are_refused_by_name(kind):
    for name, values in [*EVERY.items(), *OWN[kind].items()]:
        for value in values:
            with pytest.raises(ValueError, match=rf"^{name}: expected .*, got {re.escape(str(value))}$"):
                settings(kind, **{name: value})
