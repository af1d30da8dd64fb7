"""Sparse attention against torch's: dense causal, with the mask as a tensor, and FlexAttention with a block mask.

FlexAttention has no backward on the CPU, so only the forward races it.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import dalle_fast as df

SIZES = {"tiny": (64, 4, 16, 8), "release": (1, 8, 256, 32)}  # batch, heads, text tokens, grid edge
CHANNELS = 64
KINDS = ["row", "column", "conv"]
CAUSAL, DENSE, FLEX = "SDPA causal", "SDPA, mask as a tensor", "FlexAttention, compiled"
# At the release size, float32: (forward, forward + backward).
TARGETS = {
    "row": {CAUSAL: (4.0, 4.2), DENSE: (6.5, 5.5)},
    "column": {CAUSAL: (4.0, 4.2), DENSE: (6.5, 5.5)},
    "conv": {CAUSAL: (3.3, 3.5)},
}
TARGETS_BFLOAT16 = {"row": {CAUSAL: (3.7, 25.0)}}
# On a GPU, 16 bits, with the heads of the largest preset.
SIZES_CUDA = {"12B": (8, 62, 256, 32)}
TARGETS_CUDA = {
    "row": {FLEX: (2.0, 2.5), CAUSAL: (3.0, 4.0)},
    "column": {FLEX: (2.5, 3.0)},
    "conv": {FLEX: (1.2, 1.2)},
}


def inputs(size, dtype, backward, device="cpu"):
    batch, heads, text_len, edge = (SIZES | SIZES_CUDA)[size]
    shape = (batch, heads, text_len + edge**2, CHANNELS)
    generator = torch.Generator(device).manual_seed(0)

    def normal():
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    qkv = [normal().requires_grad_(backward) for _ in range(3)]
    # The heads of a token side by side, as a transformer merges them.
    return qkv, normal().transpose(1, 2).contiguous().transpose(1, 2)


def block_mask(mask, device):
    """The mask as FlexAttention takes it."""
    return create_block_mask(lambda b, h, q, k: mask.keep(q, k), None, None, mask.seq_len, mask.seq_len, device)


def compare(race, name, mask, qkv, upstream, peers, targets, backward, **options):
    """Race sparse_attention, and its gradients if `backward`."""

    def step(attend):
        def run():
            out = attend()
            return (out, *torch.autograd.grad(out, qkv, upstream)) if backward else out

        return run

    exact = [x.detach().float().requires_grad_(backward) for x in qkv]
    out = df.reference.sparse_attention(*exact, mask)
    expected = (out, *torch.autograd.grad(out, exact, upstream.float())) if backward else out
    pairs = qkv[0].shape[0] * qkv[0].shape[1] * mask.dense().sum().item()
    race(
        f"attention {name}{' forward + backward' if backward else ' forward'}",
        step(lambda: df.sparse_attention(*qkv, mask)),
        peers={peer: step(attend) for peer, attend in peers.items()},
        expected=expected,
        flops=(14 if backward else 4) * CHANNELS * pairs,  # two products, and five more
        targets={peer: ratios[backward] for peer, ratios in targets.items()},
        **options,
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_float32(race, size, kind, backward):
    _, _, text_len, edge = SIZES[size]
    mask = df.AttentionMask(kind, text_len, edge, edge)
    qkv, upstream = inputs(size, torch.float32, backward)
    dense = mask.dense()
    peers = {
        CAUSAL: lambda: F.scaled_dot_product_attention(*qkv, is_causal=True),
        DENSE: lambda: F.scaled_dot_product_attention(*qkv, attn_mask=dense),
    }
    if not backward:
        blocks = block_mask(mask, "cpu")
        flex = torch.compile(flex_attention, dynamic=False)
        peers[FLEX] = lambda: flex(*qkv, block_mask=blocks)
    targets = TARGETS[kind] if size == "release" else {}
    compare(race, f"{size} {kind}", mask, qkv, upstream, peers, targets, backward, rounds=20)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(race, kind, backward):
    _, _, text_len, edge = SIZES["release"]
    mask = df.AttentionMask(kind, text_len, edge, edge)
    qkv, upstream = inputs("release", torch.bfloat16, backward)
    peers = {CAUSAL: lambda: F.scaled_dot_product_attention(*qkv, is_causal=True)}
    targets = TARGETS_BFLOAT16.get(kind, {})
    rounds = 3 if backward else 20  # torch's backward takes seconds
    compare(
        race,
        f"release {kind} bfloat16",
        mask,
        qkv,
        upstream,
        peers,
        targets,
        backward,
        rounds=rounds,
        rtol=2e-2,
        atol=2e-2,
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float16) for kind in KINDS), ("row", torch.bfloat16)], ids=str
)
def test_cuda(race, kind, dtype, backward):
    _, _, text_len, edge = SIZES_CUDA["12B"]
    mask = df.AttentionMask(kind, text_len, edge, edge)
    qkv, upstream = inputs("12B", dtype, backward, "cuda")
    blocks = block_mask(mask, "cuda")
    flex = torch.compile(flex_attention, dynamic=False)
    compare(
        race,
        f"12B {kind} {str(dtype).removeprefix('torch.')}",
        mask,
        qkv,
        upstream,
        {
            FLEX: lambda: flex(*qkv, block_mask=blocks),
            CAUSAL: lambda: F.scaled_dot_product_attention(*qkv, is_causal=True),
        },
        TARGETS_CUDA[kind],
        backward,
        rounds=10,
        iterations=10,
        rtol=2e-2,
        atol=2e-2,
    )
