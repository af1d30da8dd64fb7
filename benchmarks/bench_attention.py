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
@pytest.mark.parametrize("peer", ["dalle_fast", "sdpa"])
def test_attention(benchmark, size, kind, backward, peer):
    batch, heads, text_len, edge = SIZES[size]
    mask = df.AttentionMask(kind, text_len, edge, edge)
    dense = mask.dense()
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, batch, heads, mask.seq_len, 64, generator=generator, requires_grad=backward)

    def attend():
        if peer == "dalle_fast":
            return df.sparse_attention(*qkv, mask)
        return F.scaled_dot_product_attention(*qkv, attn_mask=dense)

    def step():
        out = attend()
        if backward:
            torch.autograd.grad(out, qkv, torch.ones_like(out))

    torch.testing.assert_close(attend(), df.reference.sparse_attention(*qkv, mask), rtol=1e-4, atol=1e-5)
    benchmark.group = f"{size} {kind} {'forward+backward' if backward else 'forward'}"
    benchmark.pedantic(step, rounds=10, warmup_rounds=2)
