"""Sparse attention against torch's attention with the same mask as a tensor: one process, same tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dalle_fast as df

SIZES = {"tiny": (64, 4, 16, 8), "release": (1, 8, 256, 32)}  # batch, heads, text tokens, grid edge


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["row", "column", "conv"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_attention(race, size, kind, backward):
    batch, heads, text_len, edge = SIZES[size]
    mask = df.AttentionMask(kind, text_len, edge, edge)
    dense = mask.dense()
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, batch, heads, mask.seq_len, 64, generator=generator, requires_grad=backward)

    def step(attend):
        out = attend(*qkv)
        return torch.autograd.grad(out.sum(), qkv) if backward else out

    race(
        f"attention {size} {kind} {'f+b' if backward else 'f'}",
        lambda: step(lambda q, k, v: df.sparse_attention(q, k, v, mask)),
        {"SDPA mask tensor": lambda: step(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=dense))},
        expected=lambda: step(lambda q, k, v: df.reference.sparse_attention(q, k, v, mask)),
        flops=4 * int(dense.sum()) * batch * heads * 64 * (3.5 if backward else 1),
    )
