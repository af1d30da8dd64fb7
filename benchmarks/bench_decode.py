"""One step of sampling: a new token's attention from small shared caches, against SDPA over a full cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dalle_fast as df

HEADS, CHANNELS, TEXT, EDGE, POSITION = 8, 64, 256, 32, 600
ONE, MANY = 6.0, {"row": 22.0, "column": 18.0, "conv": 14.0}  # targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("candidates", [1, 8, 32])
@pytest.mark.parametrize("kind", MANY)
def test_decode(race, kind, candidates, dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    mask = df.AttentionMask(kind, TEXT, EDGE, EDGE)
    new = [normal(candidates, HEADS, CHANNELS) for _ in range(3)]
    text = [normal(1, HEADS, TEXT, CHANNELS) for _ in range(2)]
    caches = [normal(candidates, HEADS, mask.cache_len, CHANNELS) for _ in range(2)]
    full = [normal(candidates, HEADS, TEXT + POSITION + 1, CHANNELS) for _ in range(2)]
    position = torch.tensor(POSITION)
    window = int(mask.dense()[TEXT + POSITION, TEXT:].sum())
    rounding = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}

    race(
        f"decode {kind} {candidates} {str(dtype).removeprefix('torch.')}",
        lambda: df.decode_attention(*new, *text, *caches, position, mask),
        {"SDPA full cache": lambda: F.scaled_dot_product_attention(new[0][:, :, None], *full)},
        expected=lambda: df.reference.decode_attention(*new, *text, *caches, position, mask),
        bytes=2 * HEADS * CHANNELS * (TEXT + candidates * window) * dtype.itemsize,
        targets={"SDPA full cache": ONE if candidates == 1 else MANY[kind]},
        iterations={1: 50, 8: 10, 32: 5}[candidates],
        **rounding,
    )
