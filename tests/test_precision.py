"""Resblocks in 16 bits: which numbers are rounded, and gradient scales that stay independent per resblock."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.training import checkpoint, same, settings, task
from PIL import Image
from torch import nn

import dalle_fast as df
from dalle_fast.config import DALLEConfig
from dalle_fast.figures import plot_logs
from dalle_fast.models import DALLE
from dalle_fast.models.precision import Precision, dtype_of, rounded_linear
from dalle_fast.models.transformer import Linear
from dalle_fast.training import AdamW16, TrainingDiverged, fit
from dalle_fast.training.scales import GradientScales

SMALL = DALLEConfig(
    text_vocab=20, text_len=4, image_vocab=13, height=3, width=3, d_model=32, n_layer=3, head_dim=16, kernel=3
)
HALVES = [torch.float16, torch.bfloat16]


def small_model() -> DALLE:
    torch.manual_seed(0)
    return DALLE(SMALL)


def small_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(20, (4, 4), generator=generator), torch.randint(13, (4, 3, 3), generator=generator)


def new_scales(model: DALLE, **options) -> GradientScales:
    scales = GradientScales([resblock for _, resblock in model.resblocks()], **options)
    scales.watch(list(model.parameters()))
    return scales


def gradients(model: DALLE, precision: Precision) -> list[torch.Tensor]:
    """Of the loss of the small batch, true to size."""
    model.zero_grad()
    model.loss(*small_batch(), precision)[0].backward()
    factors = precision.scales.factors() if precision.scales else torch.ones(len(list(model.parameters())))
    return [p.grad * factor for p, factor in zip(model.parameters(), factors, strict=True)]


# ---------------------------------------------------------------------------------------------- 16 bits


def test_the_default_is_float16_on_cuda():
    assert dtype_of("auto", "cuda:1") == torch.float16
    assert dtype_of("auto", "cpu") == torch.float32
    assert [dtype_of(name, "cuda") for name in ("float32", "bfloat16")] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
def test_rounded_linear_rounds_the_matrices_and_nothing_else(dtype):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(5, 7, n, generator=generator).to(dtype) for n in (24, 40))
    weight, bias = torch.randn(40, 24, generator=generator), torch.randn(40, generator=generator)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    out = rounded_linear(*leaves)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(out, leaves, grad)
    rounded, rows = weight.to(dtype).double(), grad.double().flatten(0, 1)
    exact = {
        "out": (out, x.double() @ rounded.t() + bias),
        "x": (grad_x, grad.double() @ rounded),
        "weight": (grad_weight, rows.t() @ x.double().flatten(0, 1)),
    }
    for name, (result, wanted) in exact.items():
        eps = torch.finfo(dtype).eps  # half of it is the rounding; sums of float32 may fall on the other side
        assert ((result - wanted).abs() <= 0.51 * eps * wanted.abs() + 1e-5).all(), name
    assert [tensor.dtype for tensor in (out, grad_x, grad_weight, grad_bias)] == [dtype, dtype, *[torch.float32] * 2]
    assert torch.equal(grad_weight, grad_weight.to(dtype).float())
    torch.testing.assert_close(grad_bias, rows.sum(0).float())


@pytest.mark.parametrize("dtype", HALVES)
def test_resblocks_have_16_bits_and_the_rest_has_32(dtype):
    model, seen = small_model(), []

    def look(module, inputs, output):
        tensors = output if isinstance(output, tuple) else (output,)
        seen.extend((module, tensor.dtype) for tensor in (*inputs, *tensors))

    inside = {module for _, resblock in model.resblocks() for module in resblock.modules()}
    for module in model.modules():
        if module is not model:
            module.register_forward_hook(look)
    logits = model(*small_batch(), Precision(dtype))
    assert {module for module, _ in seen} >= inside - {nn.Sequential}
    assert all(got == dtype for module, got in seen if module in inside)
    assert all(got in (torch.float32, torch.int64) for module, got in seen if module not in inside)
    assert [x.dtype for x in logits] == [torch.float32] * 2
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_recomputation_changes_no_bit(dtype):
    model = small_model()
    plain, again = (gradients(model, Precision(dtype, recompute, new_scales(model))) for recompute in (False, True))
    assert same(plain, again)


def test_scales_that_are_powers_of_2_change_no_bit_in_float32():
    model = small_model()
    assert same(gradients(model, Precision()), gradients(model, Precision(scales=new_scales(model))))


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_are_those_of_float32_but_for_rounding(dtype):
    model = small_model()
    exact, scales = gradients(model, Precision()), new_scales(model)
    for result, wanted in zip(gradients(model, Precision(dtype, scales=scales)), exact, strict=True):
        assert result.dtype == torch.float32
        assert (result - wanted).norm() <= 8 * torch.finfo(dtype).eps * wanted.norm().clamp(min=1e-3)
    assert not scales.nonfinite.any()


# ---------------------------------------------------------------------------------------------- underflow


class OneScale(GradientScales):
    """As torch.amp.GradScaler: one scale, halved whenever anything overflows."""

    def update(self):
        if self.nonfinite.any():
            self.scale.mul_(0.5)
        self.nonfinite.zero_()


class Stack(nn.Module):
    """Four resblocks; the loss after the first two has 2^42 times the weight of the loss after the last two.

    So the later gradients are far smaller, as they are in deep models.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(5))
        self.resblocks = nn.ModuleList(nn.Sequential(Linear(16, 32), nn.GELU(), Linear(32, 16)) for _ in range(4))
        self.x, self.early, self.late = torch.randn(3, 64, 16)

    def losses(self, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
        x, branch = self.x, None
        for i, norm in enumerate(self.norms):
            x, normed = df.residual_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, *precision.between(i, 4))
            if i == 2:
                early = (x - self.early).square().mean()
            if i < 4:
                branch = precision.run(self.resblocks[i], norm, x, normed)
        return early, (normed - self.late).square().mean()


def train_stack(kind: type[GradientScales], steps: int = 60) -> tuple[GradientScales, torch.Tensor, torch.Tensor]:
    """The scales, the two losses, and the share of zeros among the gradients of each resblock's matrices."""
    model = Stack()
    scales = kind(model.resblocks)
    parameters = [p for resblock in model.resblocks for p in resblock.parameters()]
    scales.watch(parameters)
    optimizer = AdamW16(parameters, lr=1e-2, eps=1e-16, weight_decay=0.0, moments="float32")
    scales.scale.fill_(2.0**24)  # the largest; settled before the training starts
    precision, made = Precision(torch.float16, scales=scales), 0
    while made < steps:
        early, late = model.losses(precision)
        (2.0**12 * early + 2.0**-30 * late).backward()
        factors = scales.factors()
        _, nonfinite = df.gradient_norm([p.grad for p in parameters], factors)
        skip = scales.skip(nonfinite)
        if made or not skip.any():
            made += 1
            optimizer.step(unscale=factors, skip=skip)
        else:
            scales.since_division.fill_(125)
        scales.update()
        zeros = torch.stack([(p.grad == 0).float().mean() for p in parameters if p.ndim == 2]).view(4, 2).mean(1)
        optimizer.zero_grad()
    return scales, torch.stack([early, late]).detach(), zeros


def test_later_gradients_underflow_with_one_scale_and_train_with_ours():
    untrained = torch.stack(Stack().losses(Precision())).detach()
    scales, losses, zeros = train_stack(OneScale)
    assert losses[0] < 0.7 * untrained[0]
    assert (zeros[:2] < 0.1).all()
    assert (zeros[2:] == 1).all()
    assert losses[1] > 0.95 * untrained[1]  # moves with what the early ones make
    scales, losses, zeros = train_stack(GradientScales)
    assert (losses < 0.7 * untrained).all()
    assert (zeros < 0.1).all()
    assert scales.scale[:2].max() < 2.0**12 < 2.0**20 < scales.scale[2:].min()


# ---------------------------------------------------------------------------------------------- overflow


def one_step(skipping: str, block: int, planted: float | None) -> tuple[DALLE, GradientScales]:
    """A step of the small model; ``planted`` goes into the gradient that enters a resblock, at one token."""
    model = small_model()
    scales = new_scales(model, skipping=skipping)
    optimizer = AdamW16(model.parameters(), lr=1e-3)
    resblock = model.resblocks()[block][1]

    def plant(grad: torch.Tensor) -> torch.Tensor:
        changed = grad.clone()
        changed[1, 5] = planted
        return changed

    if planted is not None:
        resblock.register_forward_hook(lambda module, inputs, output: output.register_hook(plant) and None)
    model.loss(*small_batch(), Precision(torch.float16, scales=scales))[0].backward()
    factors = scales.factors()
    _, nonfinite = df.gradient_norm([p.grad for p in model.parameters()], factors)
    optimizer.step(unscale=factors, skip=scales.skip(nonfinite))
    scales.update()
    return model, scales


@pytest.mark.parametrize("block", [1, 3, 5])  # MLPs, in which tokens do not meet
def test_an_infinite_gradient_moves_no_scale_but_its_own(block):
    start = small_model()
    for skipping in ("step", "resblock"):
        model, scales = one_step(skipping, block, float("inf"))
        expected = torch.full((6,), 2.0**13) * 2 ** (1 / 1000)
        expected[block] = 2.0**13 / 2**0.5
        torch.testing.assert_close(scales.scale, expected, rtol=1e-7, atol=0)
        assert scales.since_division.tolist() == [0 if i == block else 125 for i in range(6)]
        assert scales.overflows.tolist() == [int(i == block) for i in range(6)]
        if skipping == "step":
            assert same(model.state_dict(), start.state_dict())
    # The token whose gradient was filtered counts as one without a gradient.
    other, _ = one_step("resblock", block, 0.0)
    own = {id(p) for p in model.resblocks()[block][1].parameters()}
    for (name, p), without, before in zip(
        model.named_parameters(), other.parameters(), start.parameters(), strict=True
    ):
        assert torch.equal(p, before if id(p) in own else without), name
        assert not torch.equal(before, without), name
    # Behind the block, nothing has happened at all.
    clean, _ = one_step("resblock", block, None)
    for (_, later), (_, unharmed) in zip(model.resblocks()[block + 1 :], clean.resblocks()[block + 1 :], strict=True):
        assert same(later.state_dict(), unharmed.state_dict())


@pytest.mark.parametrize("skipping", ["step", "resblock"])
def test_a_gradient_outside_of_the_resblocks_skips_all(skipping):
    model = small_model()
    scales = new_scales(model, skipping=skipping)
    nonfinite = torch.tensor([name == "start" for name, _ in model.named_parameters()])
    assert scales.skip(nonfinite).all()
    assert not scales.nonfinite.any()
    assert not scales.skip(torch.zeros_like(nonfinite)).any()


def test_the_scales_follow_the_rule_for_1000_steps():
    resblocks = [nn.Linear(2, 1) for _ in range(6)]
    scales = GradientScales(resblocks, replicas=4)
    outside = nn.Parameter(torch.zeros(1))
    scales.watch([outside, *(p for resblock in resblocks for p in resblock.parameters())])
    rng = np.random.default_rng(0)
    share = np.array([0.0, 1e-3, 1e-2, 0.1, 0.5, 1.0])  # of steps in which a resblock overflows
    expected, last = [4 * 2.0**13] * 6, [-125] * 6
    for step in range(1000):
        overflows = rng.random(6) < share
        scales.skip(torch.tensor([False, *np.repeat(overflows, 2)]))  # of the weight and the bias
        scales.update()
        for i in range(6):
            if not overflows[i]:
                expected[i] = float(np.float32(expected[i]) * np.float32(2 ** (1 / 1000)))
            elif step - last[i] >= 125:
                expected[i] = float(np.float32(expected[i]) / np.float32(2**0.5))
                last[i] = step
            expected[i] = min(max(expected[i], 4 * 2.0**7), 4 * 2.0**24)
        assert scales.scale.tolist() == expected, step
    assert scales.overflows[5] == 1000
    assert scales.scale[0] == pytest.approx(4 * 2.0**14, rel=1e-4)
    assert scales.scale[5] == pytest.approx(4 * 2.0**9, rel=1e-4)


# ---------------------------------------------------------------------------------------------- in the training loop


def overflowing(config, at: set[int], factor: float = 1e30):
    """A task whose gradients overflow float16 at some steps, though its loss is finite if the factor is."""
    broken = task("dalle", config)
    loss = broken.loss

    def sometimes_large(model, batch, step):
        value, metrics = loss(model, batch, step)
        return value * (factor if step in at else 1.0), metrics

    broken.loss = sometimes_large
    return broken


@pytest.mark.parametrize("skip_overflow", ["step", "resblock"])
def test_resumed_scales_equal_uninterrupted_ones_bitwise(skip_overflow, tmp_path):
    config = settings("dalle", resblock_dtype="float16", skip_overflow=skip_overflow)
    whole = overflowing(config, {2, 5})
    fit(whole, config, tmp_path / "whole")
    fit(overflowing(config, {2, 5}), replace(config, steps=4), tmp_path / "parts")
    parts = overflowing(config, {2, 5})
    fit(parts, config, tmp_path / "parts")
    for name, tensor in whole.scales.tensors().items():
        assert torch.equal(parts.scales.tensors()[name], tensor), name
    contents = [checkpoint(tmp_path / folder, "dalle") for folder in ("whole", "parts")]
    assert same(*({k: v for k, v in content.items() if k != "seconds"} for content in contents))
    assert whole.scales.overflows.tolist() == [2] * 4
    assert whole.scales.scale.tolist() == pytest.approx([2**13 * 2 ** (5 / 1000) / 2**0.5] * 4, rel=1e-6)


def test_a_run_may_take_up_16_bits_and_leave_them(tmp_path):
    for steps, dtype, log2 in ((2, "float32", None), (5, "float16", 13.003), (7, "float32", None)):
        config = settings("dalle", steps=steps, resblock_dtype=dtype)
        trained = task("dalle", config)
        fit(trained, config, tmp_path)
        assert checkpoint(tmp_path, "dalle")["step"] == steps
        assert (trained.scales and trained.scales.record()["log2_scales"][0]) == log2


def test_the_log_has_the_scales(tmp_path):
    config = settings("dalle", resblock_dtype="bfloat16", log_every=3)
    trained = overflowing(config, set())
    fit(trained, config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "dalle" / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["log2_scales"]) for line in lines if "log2_scales" in line] == [
        (3, [13.003] * 4), (6, [13.006] * 4), (7, [13.007] * 4),
    ]  # fmt: skip
    assert not any("overflows" in line for line in lines)
    assert [path.name for path in plot_logs(tmp_path)] == ["losses.png", "scales.png"]
    assert Image.open(tmp_path / "scales.png").size == (630, 360)
    trained.scales.nonfinite[2] = 1
    trained.scales.update()
    assert trained.scales.record()["overflows"] == [0, 0, 1, 0]


def test_scales_have_the_time_they_need_but_not_for_ever(tmp_path, monkeypatch):
    config = settings("dalle", steps=104, resblock_dtype="float16", val_every=1000)
    always = set(range(1, 103))
    assert new_scales(small_model()).patience == 34 * 125
    _, metrics = fit(overflowing(config, always), config, tmp_path / "patient")
    assert metrics["skipped_updates"] == 102
    monkeypatch.setattr(GradientScales, "patience", 3)
    with pytest.raises(TrainingDiverged, match="none in 3 steps"):
        fit(overflowing(config, always), config, tmp_path / "impatient")
    monkeypatch.undo()
    with pytest.raises(TrainingDiverged, match="none in 100 steps"):
        fit(overflowing(config, always, float("nan")), config, tmp_path / "hopeless")
