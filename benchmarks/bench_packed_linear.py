"""The linear layers of one sampling step (12 layers of d_model 512 and the head) on packed weights, against F.linear.

All layers in turn: 150 MB of float32 weights come from memory, not from the cache, as they do in a step.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dalle_fast as df
from dalle_fast import reference

LAYER = [(512, 1536), (512, 512), (512, 2048), (2048, 512)]  # in, out: q k v, projection, feed-forward
HEAD = (512, 8192)
N_LAYER = 12
TARGETS = {
    ("float32", 8): 3.5,
    ("float32", 32): 2.5,
    ("bfloat16", 1): 4.0,
    ("bfloat16", 8): 4.5,
    ("bfloat16", 32): 2.5,
    ("int8", 1): 7.0,
    ("int8", 8): 5.3,
    ("int8", 32): 2.5,
}


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(out, n, generator=generator) * n**-0.5 for n, out in [*LAYER * N_LAYER, HEAD]]


@torch.no_grad()
@pytest.mark.parametrize("candidates", [1, 8, 32])
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_step(race, weights, format, candidates):
    generator = torch.Generator().manual_seed(1)
    x = {n: torch.randn(candidates, n, generator=generator) for n in (512, 2048)}
    x16 = {n: value.bfloat16() for n, value in x.items()}
    packed = [df.pack_linear(weight, format) for weight in weights]
    weights16 = [weight.bfloat16() for weight in weights]

    def ours():
        for layer in packed:
            out = df.packed_linear(x[layer.in_features], layer)
        return out

    def step(x, weights):
        for weight in weights:
            F.linear(x[weight.shape[1]], weight)

    race(
        f"linears of a step, {format}, N = {candidates}",
        ours,
        peers={"F.linear float32": lambda: step(x, weights), "F.linear bfloat16": lambda: step(x16, weights16)},
        expected=lambda: reference.packed_linear(x[512], reference.pack_linear(weights[-1], format)),
        flops=2 * candidates * sum(weight.numel() for weight in weights),
        bytes=sum(layer.panels.nbytes for layer in packed),
        targets={"F.linear float32": TARGETS[format, candidates]} if (format, candidates) in TARGETS else None,
        rounds=10,
    )
