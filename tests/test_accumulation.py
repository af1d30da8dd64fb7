"""Batches in parts, one after the other: the loss and gradients of the whole."""

import numpy as np
import pytest
import torch
from helpers.training import records, same, settings, task

from dalle_fast.training import fit
from dalle_fast.training import loop as training_loop
from dalle_fast.training.loop import new_state

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("dalle", {}), ("dalle", {"recompute": False}), ("dalle", {"resblock_dtype": "float16"}), ("dalle", {"seed": 8})],
)
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_a_batch_in_parts_has_the_loss_and_the_gradients_of_the_whole(kind, changes, parts):
    config = settings(kind, batch_size=6, **changes)
    states, seen = [], []
    for accumulate in (1, parts):
        some = task(kind, config)
        state = new_state(some.model, config, some.scales)
        loss, metrics = training_loop.add_gradients(state, some, next(some.batches(3)), accumulate)
        states.append(state)
        seen.append({"loss": loss, **metrics})
    whole, in_parts = states
    close = 2e-2 if "resblock_dtype" in changes else 1e-5
    for name, value in seen[0].items():
        assert seen[1][name].item() == pytest.approx(value.item(), rel=close), name
    for a, b in zip(whole.parameters, in_parts.parameters, strict=True):
        assert (a.grad - b.grad).norm() <= close * a.grad.norm()
    if whole.scales:
        assert torch.equal(whole.scales.scale, in_parts.scales.scale)


def test_accumulation_changes_a_training_by_rounding_alone(tmp_path):
    losses = []
    for parts in (1, 4):
        config = settings("dalle", batch_size=4, accumulate=parts, log_every=1, lr=1e-3)
        fit(task("dalle", config), config, tmp_path / str(parts))
        losses.append([record["loss"] for record in records(tmp_path / str(parts), "dalle") if "loss" in record])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[1] != losses[0]


def test_an_overflow_in_one_part_skips_the_step():
    config = settings("dalle", batch_size=4, accumulate=4)
    some = task("dalle", config)
    loss, calls = some.loss, []

    def sometimes_infinite(model, batch, step):
        calls.append(len(batch["codes"]))
        value, metrics = loss(model, batch, step)
        return value * (float("inf") if len(calls) == 2 else 1.0), metrics

    some.loss = sometimes_infinite
    state = new_state(some.model, config)
    before = [p.detach().clone() for p in state.parameters]
    finite, _ = training_loop.train_step(state, some, next(some.batches(0)), 1e-3, config)
    assert not finite and calls == [1, 1, 1, 1]
    assert same(before, [p.detach() for p in state.parameters])


def test_the_dvae_draws_other_noise_in_each_part(tmp_path):
    config = settings("dvae", batch_size=4, accumulate=2, grain=0.1)
    some = task("dvae", config)
    batch = {"image": next(some.batches(0))["image"][:1].expand(4, -1, -1, -1)}
    losses = [some.loss(some.model, part, 0)[0].item() for part in training_loop.split(batch, 2)]
    assert losses[0] != losses[1]
    _, metrics = fit(some, config, tmp_path)
    assert np.isfinite(metrics["loss"]) and 1 <= metrics["codes_used"] <= 16


def test_batches_that_cannot_be_had_in_parts_are_refused():
    with pytest.raises(ValueError, match="accumulate: expected a divisor of batch_size 4, got 3"):
        settings("dalle", accumulate=3)
    with pytest.raises(ValueError, match="accumulate: expected 1 or more, got 0"):
        settings("dvae", accumulate=0)
    with pytest.raises(ValueError, match=r"accumulate: expected 1, as the loss of CLIP needs the whole batch.*got 2"):
        settings("clip", accumulate=2)
    with pytest.raises(ValueError, match="accumulate: expected 1 with PowerSGD, got 2"):
        settings("dalle", accumulate=2, powersgd_rank=8)
    with pytest.raises(ValueError, match="accumulate: expected a divisor of the 4 samples of each process, got 3"):
        list(training_loop.split({"codes": torch.zeros(4, 2)}, 3))
