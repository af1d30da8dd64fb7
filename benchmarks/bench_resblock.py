"""Residual sum, LayerNorm and casts in one pass, against the same from torch's ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import dalle_fast as df

ROWS, WIDTH = 10240, 1024
TARGETS = {"reused": 5.0, "fresh": 3.0}


def inputs():
    """x, branch in bfloat16, weight, bias."""
    generator = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(ROWS, WIDTH, generator=generator) for _ in range(2))
    return [x, branch.bfloat16(), *(torch.randn(WIDTH, generator=generator) for _ in range(2))]


def eager(x, branch, weight, bias):
    total = x + branch.float()
    return total, F.layer_norm(total, (WIDTH,), weight, bias).to(torch.bfloat16)


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


def test_forward_and_backward(race, memory):
    leaves = [tensor.requires_grad_() for tensor in inputs()]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(ROWS, WIDTH, generator=generator).to(dtype) for dtype in (torch.float32, torch.bfloat16)]

    def step(forward):
        return torch.autograd.grad(forward(*leaves), leaves, upstream)

    race(
        f"residual layer norm + backward, {memory}",
        lambda: step(ours),
        peers={"eager": lambda: step(eager)},
        expected=lambda: step(eager),
        bytes=ROWS * WIDTH * 28,
        rtol=1e-2,
        atol=2e-3,
    )
