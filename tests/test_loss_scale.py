"""The dVAE in 16 bits: which numbers are rounded, and the scale of its loss."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.training import DVAE, checkpoint, same, settings, task
from torch import nn

from dalle_fast.config import DVAEConfig
from dalle_fast.data.sources.scenes import SceneCorpus
from dalle_fast.models import DiscreteVAE
from dalle_fast.models.precision import rounded_conv2d
from dalle_fast.training import TrainingDiverged, fit, loop
from dalle_fast.training.dvae import DVAETask
from dalle_fast.training.scales import LossScale

HALVES = [torch.float16, torch.bfloat16]


def scaled(factor, some: DVAETask, at: set[int] | None = None) -> DVAETask:
    """The task, with its loss multiplied by a factor at some steps or at all."""
    loss = some.loss

    def multiplied(model, batch, step):
        value, metrics = loss(model, batch, step)
        return value * (factor if at is None or step in at else 1.0), metrics

    some.loss = multiplied
    return some


def train(some: DVAETask, config) -> tuple[loop.State, torch.Tensor]:
    """The state after all steps, and the losses."""
    state, batches, losses = loop.new_state(some.model, config, some.scales), some.batches(0), []
    for step in range(config.steps):
        _, metrics = loop.train_step(state, some, next(batches), config.lr_at(step), config)
        state.step = step + 1
        losses.append(metrics["loss"])
    return state, torch.stack(losses)


# ---------------------------------------------------------------------------------------------- 16 bits


@pytest.mark.parametrize("dtype", HALVES)
def test_rounded_convolution(dtype):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, n, 7, 7, generator=generator).to(dtype) for n in (4, 6))
    weight, bias = torch.randn(6, 4, 3, 3, generator=generator), torch.randn(6, generator=generator)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    results = [out := rounded_conv2d(*leaves, padding=1), *torch.autograd.grad(out, leaves, grad)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight.to(dtype), bias)]
    wanted = [out := F.conv2d(*exact, padding=1), *torch.autograd.grad(out, exact, grad.double())]
    for result, want in zip(results, wanted, strict=True):
        eps = torch.finfo(dtype).eps  # half of it is the rounding; sums of float32 may fall on the other side
        assert ((result - want).abs() <= 0.51 * eps * want.abs() + 1e-5).all()
    assert [result.dtype for result in results] == [dtype, dtype, torch.float32, torch.float32]
    assert torch.equal(results[2], results[2].to(dtype).float())
    torch.testing.assert_close(results[3], wanted[3].float())


@pytest.mark.parametrize("dtype", HALVES)
def test_convolutions_have_16_bits_but_what_makes_the_logits(dtype):
    model, seen = DiscreteVAE(DVAE), {}
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: seen.update({name: {inputs[0].dtype, output.dtype}})
            )
    loss, metrics = model.loss(torch.rand(2, 3, 8, 8), 1.0, 1.0, 0, dtype)
    exact = {name for name in seen if name.startswith("encoder.blocks.output")}
    assert len(exact) == 2
    assert all(got == {torch.float32 if name in exact else dtype} for name, got in seen.items())
    assert len(seen) == sum(not list(module.children()) for module in model.modules()) - 1  # not the codebook
    assert loss.dtype == metrics["kl"].dtype == metrics["mse"].dtype == torch.float32
    loss.backward()
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_it_is_validated_in_float32():
    some = task("dvae", settings("dvae", conv_dtype="float16"))
    batch, _ = next(iter(some.validation()))
    expected = some.model.loss(batch["image"], some.config.tau_end, some.config.beta_end, seed=0)[0]
    assert torch.equal(some.evaluate(some.model, batch)["loss"], expected)


def test_float16_alone_has_a_scale():
    scales = {dtype: task("dvae", settings("dvae", conv_dtype=dtype)).scales for dtype in ("float16", "bfloat16")}
    assert isinstance(scales["float16"], LossScale)
    assert scales["bfloat16"] is task("dvae", settings("dvae")).scales is None


# ---------------------------------------------------------------------------------------------- the scale


def test_the_scale_follows_the_rule_of_torch():
    oracle, scale = torch.amp.GradScaler("cpu"), LossScale()
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter])
    scale.watch([parameter])
    oracle.scale(torch.zeros(1))
    random = np.random.default_rng(0)
    for step in range(7000):
        overflows = 4200 < step < 4700 and random.random() < 0.01  # finite for two doublings, before and after
        parameter.grad = torch.full((1,), float("inf") if overflows else 1.0)
        oracle.step(optimizer)
        oracle.update()
        assert scale.skip(parameter.grad.isfinite().logical_not()).all() == overflows
        scale.update()
        assert scale.scale.item() == oracle.get_scale(), step
        assert scale.finite_steps.item() == oracle._get_growth_tracker()
    assert scale.overflows > 1
    assert scale.factors().tolist() == [1 / scale.scale.item()]


def test_the_scale_of_gradients_that_are_all_zero_stays_finite(monkeypatch):
    monkeypatch.setattr(LossScale, "GROWTH_INTERVAL", 1)
    scale = LossScale()
    for _ in range(200):
        scale.update()
    assert scale.record() == {"log2_scale": 100.0}


def test_the_loss_keeps_its_value_and_gradients_their_size():
    config = settings("dvae", conv_dtype="float16", init_codes=False)  # centroids of noise round badly
    half, full = task("dvae", config), task("dvae", settings("dvae", init_codes=False))
    batch, parameters = next(half.batches(0)), list(half.model.parameters())

    def loss_and_gradient(some: DVAETask) -> tuple[torch.Tensor, torch.Tensor]:
        loss, _ = some.loss(half.model, batch, 0)
        return loss, torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)])

    exact_loss, exact = loss_and_gradient(full)
    half.scales.watch(parameters)
    for log2 in (8, 12):  # neither underflow nor overflow
        half.scales.scale.fill_(2.0**log2)
        loss, gradient = loss_and_gradient(half)
        assert half.scales.factors().tolist() == [2.0**-log2] * len(parameters)
        assert loss.item() == pytest.approx(exact_loss.item(), abs=1e-3)
        assert (2.0**-log2 * gradient - exact).norm() < 0.01 * exact.norm()


def test_an_overflow_halves_the_scale_and_skips_the_step():
    config = settings("dvae", steps=3, conv_dtype="float16", clip_norm=0.0)
    some = scaled(1e30, task("dvae", config), at={1})
    state, batches = loop.new_state(some.model, config, some.scales), some.batches(0)
    made, values, scales = [], [], []
    some.scales.scale.fill_(2.0**10)
    for step in range(3):
        values.append([p.detach().clone() for p in some.model.parameters()])
        made.append(loop.train_step(state, some, next(batches), 1e-3, config)[0])
        state.step = step + 1
        scales.append(some.scales.scale.item())
    assert made == [True, False, True]
    assert same(values[1], values[2])
    assert not same(values[0], values[1])
    assert scales == [2.0**10, 2.0**9, 2.0**9]
    assert some.scales.record() == {"log2_scale": 9.0, "overflows": 1}
    assert "encoder.blocks.group_1.block_1" in state.incidents.result()["nonfinite"]


def test_resumed_equals_uninterrupted_bitwise(tmp_path):
    config = settings("dvae", conv_dtype="float16", log_every=7)
    fit(scaled(1e30, task("dvae", config), {2, 5}), config, tmp_path / "whole")
    short = settings("dvae", conv_dtype="float16", steps=4)
    fit(scaled(1e30, task("dvae", short), {2, 5}), short, tmp_path / "parts")
    fit(scaled(1e30, task("dvae", config), {2, 5}), config, tmp_path / "parts")
    whole, parts = (checkpoint(tmp_path / name, "dvae") for name in ("whole", "parts"))
    assert same(*({k: v for k, v in content.items() if k != "seconds"} for content in (whole, parts)))
    assert whole["scales/overflows"].item() >= 2
    lines = [json.loads(line) for line in (tmp_path / "whole" / "dvae" / "log.jsonl").read_text().splitlines()]
    (record,) = (line for line in lines if "log2_scale" in line)
    assert record["log2_scale"] == 16 - record["overflows"]
    assert record["overflows"] == whole["scales/overflows"].item()


def test_a_training_that_always_overflows_ends(tmp_path):
    config = settings("dvae", steps=50, conv_dtype="float16")
    with pytest.raises(TrainingDiverged, match="none in 40 steps"):
        fit(scaled(1e30, task("dvae", config)), config, tmp_path)


# ---------------------------------------------------------------------------------------------- in training

PAPERS_BATCH = (8 * 16**2) / (512 * 256**2)  # what a mean over it makes of the gradients of a batch of ours


def scenes(seed: int, dtype: str, steps: int, init_codes: bool = True):
    """A dVAE that learns small scenes, with losses as small as the paper's; and its settings."""
    cfg = DVAEConfig(image_size=16, vocab_size=32, n_hid=16, n_init=16, groups=(1, 2), n_blk_per_group=1, gain=1.0)
    config = settings(
        "dvae", steps=steps, lr=3e-3, lr_steps=steps, tau=0.5, tau_steps=steps, beta=1.0, beta_end=1.0, batch_size=8,
        encoder_lr=0.1, seed=seed, conv_dtype=dtype, eps=1e-16, weight_decay=0.0, clip_norm=PAPERS_BATCH,
        init_codes=init_codes,
    )  # fmt: skip
    return scaled(PAPERS_BATCH, DVAETask(SceneCorpus(200, size=16), None, cfg, config)), config


@pytest.mark.parametrize(("first", "moves"), [(1.0, False), (2.0**16, True)])
def test_small_gradients_underflow_without_the_scale(first, moves, monkeypatch):
    monkeypatch.setattr(LossScale, "FIRST", first)
    some, config = scenes(0, "float16", steps=3, init_codes=False)  # k-means makes them larger
    filters = [p for name, p in some.model.decoder.named_parameters() if "group" in name and p.ndim == 4]
    start = [p.detach().clone() for p in filters]
    train(some, config)
    assert [torch.equal(p, before) for p, before in zip(filters, start, strict=True)] == [not moves] * 10


def test_with_the_scale_a_model_learns_as_in_float32():
    def final_loss(dtype: str, seed: int) -> float:
        """Mean training loss of the last 20 steps."""
        losses = train(*scenes(seed, dtype, steps=80))[1] / PAPERS_BATCH
        assert losses[:3].mean() > 0.4
        return losses[-20:].mean().item()

    seeds = (0, 1, 2)
    half, full = (torch.tensor([final_loss(dtype, seed) for seed in seeds]) for dtype in ("float16", "float32"))
    noise = full.max() - full.min()
    assert full.max() < -0.5
    assert not torch.equal(half, full)
    assert (half - full).abs().max() < noise / 5
    assert abs(final_loss("bfloat16", 0) - full[0]) < noise / 5
