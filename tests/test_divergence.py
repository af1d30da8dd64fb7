"""A training that diverges fails, exports nothing, and leaves good checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers.training import KINDS, checkpoint, settings, stop_after, task

from dalle_fast.models import load_model
from dalle_fast.training import TrainingDiverged, fit
from dalle_fast.training import loop as training_loop

pytestmark = pytest.mark.usefixtures("one_thread")


def steps_saved(out: Path, kind: str = "dvae") -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / kind / "checkpoints").glob("step-*[0-9]"))


def spoilt(config, bad, kind: str = "dvae"):
    """A task whose loss is not finite in the steps, from 0, for which ``bad`` is true."""
    some = task(kind, config)
    loss = some.loss

    def spoil(model, batch, step):
        value, metrics = loss(model, batch, step)
        return value * (float("nan") if bad(step) else 1.0), metrics

    some.loss = spoil
    return some


@pytest.mark.parametrize("first", [6, 5, 0])
def test_a_training_that_ends_with_skipped_steps_fails_and_exports_nothing(first, tmp_path):
    config = settings("dvae", save_every=2, log_every=100)
    (tmp_path / "dvae.safetensors").write_bytes(b"an earlier model")
    with pytest.raises(
        TrainingDiverged, match=rf"none in {7 - first} steps; the last good step is {first}\. Use a smaller lr"
    ):
        fit(spoilt(config, lambda step: step >= first), config, tmp_path)
    assert (tmp_path / "dvae.safetensors").read_bytes() == b"an earlier model"
    assert steps_saved(tmp_path) == {6: [4], 5: [2, 4], 0: []}[first]  # that of step 6 is set aside
    fit(task("dvae", config), config, tmp_path)
    assert load_model(tmp_path / "dvae.safetensors")
    assert checkpoint(tmp_path, "dvae")["skipped_updates"] == 0


def test_no_checkpoint_is_written_while_steps_are_skipped(tmp_path):
    config = settings("dvae", steps=10, save_every=2, keep_checkpoints=2)
    seen = {}
    some = spoilt(config, lambda step: 4 < step < 8)
    loss = some.loss
    some.loss = lambda model, batch, step: seen.update({step: steps_saved(tmp_path)}) or loss(model, batch, step)
    fit(some, config, tmp_path)
    assert max(seen[8]) <= 4  # not 6 or 8, when steps were skipped
    assert steps_saved(tmp_path) == [9, 10]  # the one that was due came with the first good step


def test_a_run_of_skipped_steps_survives_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "MAX_SKIPPED_IN_A_ROW", 4)
    config = settings("dvae", steps=50, save_every=2)
    some = spoilt(config, lambda step: step >= 4)
    stop_after(6, some, config, tmp_path)
    assert checkpoint(tmp_path, "dvae")["skipped_in_a_row"] == 2
    assert steps_saved(tmp_path) == [2, 4, 6]  # none is deleted for it
    assert not (tmp_path / "dvae.safetensors").exists()
    with pytest.raises(TrainingDiverged, match=r"none in 4 steps; the last good step is 4\."):
        fit(spoilt(config, lambda step: step >= 4), config, tmp_path)
    assert steps_saved(tmp_path) == [2]
    assert [path.name for path in (tmp_path / "dvae" / "checkpoints").glob("*.diverged")] == ["step-00000006.diverged"]
    fit(task("dvae", config), replace(config, steps=8), tmp_path)
    assert steps_saved(tmp_path)[-1] == 8


@pytest.mark.parametrize("lr", [1e30, 1e38])
@pytest.mark.parametrize("kind", KINDS)
def test_too_large_a_step_size_never_ends_well(kind, lr, tmp_path):
    for steps in (1, 2, 3, 9):
        config = settings(kind, steps=steps, lr=lr, warmup_steps=0, log_every=1, save_every=1)
        config = replace(config, lr_end=lr) if kind == "dvae" else config
        out = tmp_path / str(steps)
        try:
            model, _ = fit(task(kind, config), config, out)
        except TrainingDiverged:
            assert not (out / f"{kind}.safetensors").exists()
        else:
            assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_training_whose_scales_still_come_down_ends_well_if_anything_was_learnt(tmp_path):
    def overflowing(first: int, steps: int):
        config = settings("dalle", steps=steps, resblock_dtype="float16", recompute=False)
        some = task("dalle", config)
        loss = some.loss

        def overflow(model, batch, step):
            value, metrics = loss(model, batch, step)
            total = model.start.sum()
            return value + ((total - total.detach()).sqrt() if step >= first else 0.0), metrics  # 0, of slope Inf

        some.loss = overflow
        return some, config

    some, config = overflowing(4, 5)
    fit(some, config, tmp_path / "learnt")
    assert checkpoint(tmp_path / "learnt", "dalle")["skipped_in_a_row"] == 1
    some, config = overflowing(0, 5)
    with pytest.raises(TrainingDiverged, match="none in 5 steps; the last good step is 0"):
        fit(some, config, tmp_path / "not learnt")
