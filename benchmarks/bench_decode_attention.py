"""One step of sampling: a new token's attention from small shared caches, against SDPA over a full cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dalle_fast as df

CHANNELS, TEXT, EDGE, POSITION = 64, 256, 32, 600
HEADS, HEADS_CUDA = 8, 62
ONE, MANY = 6.0, {"row": 22.0, "column": 18.0, "conv": 14.0}  # targets
TARGET_CUDA = 5.0


def compare(race, kind, heads, candidates, dtype, device, target, **options):
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    mask = df.AttentionMask(kind, TEXT, EDGE, EDGE)
    new = [normal(candidates, heads, CHANNELS) for _ in range(3)]
    text = [normal(1, heads, TEXT, CHANNELS) for _ in range(2)]
    caches = [normal(candidates, heads, mask.cache_len, CHANNELS) for _ in range(2)]
    full = [normal(candidates, heads, TEXT + POSITION + 1, CHANNELS) for _ in range(2)]
    position = torch.tensor(POSITION, device=device)
    window = int(mask.dense()[TEXT + POSITION, TEXT:].sum())
    rounding = {} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}

    race(
        f"decode {kind} {candidates} {str(dtype).removeprefix('torch.')}",
        lambda: df.decode_attention(*new, *text, *caches, position, mask),
        {"SDPA full cache": lambda: F.scaled_dot_product_attention(new[0][:, :, None], *full)},
        expected=lambda: df.reference.decode_attention(*new, *text, *caches, position, mask),
        bytes=2 * heads * CHANNELS * (TEXT + candidates * window) * dtype.itemsize,
        targets={"SDPA full cache": target},
        **rounding,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("candidates", [1, 8, 32])
@pytest.mark.parametrize("kind", MANY)
def test_decode(race, kind, candidates, dtype):
    target = ONE if candidates == 1 else MANY[kind]
    iterations = {1: 50, 8: 10, 32: 5}[candidates]
    compare(race, kind, HEADS, candidates, dtype, "cpu", target, iterations=iterations)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("candidates", [8, 64, 512])
@pytest.mark.parametrize("kind", MANY)
def test_cuda_decode(race, kind, candidates, dtype):
    compare(race, kind, HEADS_CUDA, candidates, dtype, "cuda", TARGET_CUDA, iterations=20)
