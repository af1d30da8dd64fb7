"""Residual sum, LayerNorm and casts in one pass, against torch's ops.

Likewise the backward of scaled resblocks: filter, unscale, LayerNorm, sum, scale and cast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import dalle_fast as df

ROWS, WIDTH, WIDTH_CUDA = 10240, 1024, 3968
TARGETS = {"reused": 5.0, "fresh": 3.0}


def inputs(width=WIDTH, device="cpu"):
    """x, branch in bfloat16, weight, bias."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    return [normal(ROWS, width), normal(ROWS, width).bfloat16(), normal(width), normal(width)]


def eager(x, branch, weight, bias):
    total = x + branch.float()
    return total, F.layer_norm(total, weight.shape, weight, bias).to(torch.bfloat16)


def ours(x, branch, weight, bias):
    return df.residual_layer_norm(x, branch, weight, bias, dtype=torch.bfloat16)


def test_forward(race, memory):
    tensors = inputs()
    race(
        f"residual layer norm, {memory}",
        lambda: ours(*tensors),
        peers={"eager": lambda: eager(*tensors)},
        expected=lambda: eager(*tensors),
        bytes=ROWS * WIDTH * 12,
        targets={"eager": TARGETS[memory]},
        rtol=1e-2,  # of bfloat16
    )


def make_step(leaves):
    """A function that takes the gradients of a forward with respect to the leaves."""
    shape, device = leaves[0].shape, leaves[0].device
    generator = torch.Generator(device).manual_seed(1)
    upstream = [torch.randn(shape, generator=generator, device=device).to(x.dtype) for x in leaves[:2]]

    def step(forward):
        return torch.autograd.grad(forward(*leaves), leaves, upstream)

    return step


def test_forward_and_backward(race, memory):
    step = make_step([tensor.requires_grad_() for tensor in inputs()])
    race(
        f"residual layer norm + backward, {memory}",
        lambda: step(ours),
        peers={"eager": lambda: step(eager)},
        expected=lambda: step(eager),
        bytes=ROWS * WIDTH * 28,
        rtol=1e-2,
        atol=2e-3,
    )


def scaled_inputs(width=WIDTH, device="cpu"):
    """Gradients of the sum and, scaled and in float16, of normed; the sum, weight, mean, rstd; scales; flag."""
    x, branch, weight, bias = inputs(width, device)
    scales = torch.tensor([2.0**13, 2.0**12], device=device)
    total, normed = df.residual_layer_norm(x, branch, weight, bias, dtype=torch.float16)
    variance, mean = torch.var_mean(total, -1, correction=0, keepdim=True)
    rstd = (variance + 1e-5).rsqrt()
    return [x, normed, total, weight, mean, rstd, *scales, torch.zeros((), dtype=torch.int32, device=device)]


def eager_scaled(grad_total, grad_normed, total, weight, mean, rstd, scale_in, scale_out, nonfinite):
    finite = grad_normed.isfinite()
    nonfinite.masked_fill_(~finite.all(), 1)
    grad = torch.where(finite, grad_normed.float(), 0.0) / scale_in
    grad, *sums = torch.ops.aten.native_layer_norm_backward(
        grad, total, weight.shape, mean, rstd, weight, torch.zeros_like(weight), [True] * 3
    )
    grad = grad_total + grad
    return grad, (grad * scale_out).half(), *sums


def ours_scaled(*tensors):
    return torch.ops.dalle_fast.residual_layer_norm_backward(*tensors[:6], torch.float16, *tensors[6:])


def test_scaled_backward(race, memory):
    tensors = scaled_inputs()
    race(
        f"scaled resblock backward, {memory}",
        lambda: ours_scaled(*tensors),
        peers={"eager": lambda: eager_scaled(*tensors)},
        expected=lambda: eager_scaled(*tensors),
        bytes=ROWS * WIDTH * 16,
        rtol=2e-3,  # of float16
    )


def test_cuda_scaled_backward(race):
    tensors = scaled_inputs(WIDTH_CUDA, "cuda")
    compiled = torch.compile(eager_scaled)
    race(
        f"scaled resblock backward, width {WIDTH_CUDA}",
        lambda: ours_scaled(*tensors),
        peers={"eager": lambda: eager_scaled(*tensors), "torch.compile": lambda: compiled(*tensors)},
        expected=lambda: eager_scaled(*tensors),
        bytes=ROWS * WIDTH_CUDA * 16,
        rtol=2e-3,
        iterations=10,
    )


def test_cuda_forward(race):
    tensors = inputs(WIDTH_CUDA, "cuda")
    compiled = torch.compile(eager)
    race(
        f"residual layer norm, width {WIDTH_CUDA}",
        lambda: ours(*tensors),
        peers={"eager": lambda: eager(*tensors), "torch.compile": lambda: compiled(*tensors)},
        expected=lambda: eager(*tensors),
        bytes=ROWS * WIDTH_CUDA * 12,
        rtol=1e-2,
        iterations=10,
    )


def test_cuda_forward_and_backward(race):
    step = make_step([tensor.requires_grad_() for tensor in inputs(WIDTH_CUDA, "cuda")])
    compiled = torch.compile(eager)
    race(
        f"residual layer norm + backward, width {WIDTH_CUDA}",
        lambda: step(ours),
        peers={"eager": lambda: step(eager), "torch.compile": lambda: step(compiled)},
        expected=lambda: step(eager),
        bytes=ROWS * WIDTH_CUDA * 28,
        iterations=10,
        rtol=1e-2,
        atol=2e-2,  # sums over 10,240 rows
    )
