"""Sparse attention against its definition: values, gradients, memory, repeatability, bad input."""

from __future__ import annotations

import pytest
import torch
from helpers.op_checks import HALVES, assert_equal, normal, same_on_any_number_of_threads, surrounded
from helpers.tolerances import FORWARD, GRADIENT, HALF, error
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_fast as df
from dalle_fast import AttentionMask, reference
from dalle_fast.mask import KINDS
from dalle_fast.ops.sparse_attention import mask_args

SMALL = {kind: AttentionMask(kind, text_len=5, height=4, width=3, kernel=3) for kind in KINDS}
# More than one tile of text and of image queries, none of them full.
LARGE = {kind: AttentionMask(kind, text_len=69, height=9, width=13, kernel=5) for kind in KINDS}
# Rows so long that a neighbourhood's rows do not touch.
WIDE = {kind: AttentionMask(kind, text_len=21, height=5, width=40, kernel=7) for kind in KINDS}


def qkv(mask, batch=2, heads=3, channels=16, seed=0, dtype=torch.float32, device="cpu"):
    shape = (batch, heads, mask.seq_len, channels)
    return [normal(*shape, seed=seed + i, dtype=dtype, device=device) for i in range(3)]


def run(module, tensors, mask, scale=None):
    """Output and the gradients of q, k and v, for a fixed upstream gradient."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = module.sparse_attention(*leaves, mask, scale)
    upstream = normal(*out.shape, seed=9, dtype=out.dtype, device=out.device)
    return [out, *torch.autograd.grad(out, leaves, upstream)]


def assert_matches_float64(tensors, mask, scale=None):
    exact = run(reference, [x.double() for x in tensors], mask, scale)
    for i, (result, wanted) in enumerate(zip(run(df, tensors, mask, scale), exact, strict=True)):
        assert result.shape == wanted.shape
        assert error(result, wanted) <= (GRADIENT if i else FORWARD)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_matches_float64(kind, scale, device):
    assert_matches_float64(qkv(LARGE[kind], device=device), LARGE[kind], scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [32, 64, 128])
def test_usual_channels(kind, channels, device):
    """These numbers of channels are constants in the kernels."""
    assert_matches_float64(qkv(WIDE[kind], 1, 2, channels, device=device), WIDE[kind])


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    text_len=st.integers(0, 30),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    radius=st.integers(0, 6),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 40)),
    seed=st.integers(0, 1000),
)
def test_odd_sizes(kind, text_len, grid, radius, sizes, seed, device):
    mask = AttentionMask(kind, text_len, *grid, kernel=2 * radius + 1)
    assert_matches_float64(qkv(mask, *sizes, seed=seed, device=device), mask)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, device):
    mask = AttentionMask(kind, text_len=3, height=3, width=2, kernel=3)
    tensors = [x.requires_grad_() for x in qkv(mask, 1, 2, 2, dtype=torch.float64, device=device)]
    assert torch.autograd.gradcheck(lambda q, k, v: df.sparse_attention(q, k, v, mask), tensors)


def assert_no_worse_than_torch(tensors, mask):
    """In 16 bits; small results may be off by one rounding of the largest."""
    dtype = tensors[0].dtype
    exact = run(reference, [x.double() for x in tensors], mask)
    theirs = run(reference, tensors, mask)
    for result, eager, wanted in zip(run(df, tensors, mask), theirs, exact, strict=True):
        assert result.dtype == dtype
        assert error(result, wanted) <= max(HALF * error(eager, wanted), torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [16, 64, 128])
def test_16_bits_are_no_worse_than_torch(kind, channels, dtype, device):
    assert_no_worse_than_torch(qkv(LARGE[kind], 1, 2, channels, dtype=dtype, device=device), LARGE[kind])


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    text_len=st.integers(0, 140),
    grid=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    radius=st.integers(0, 6),
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from([8, 24, 32, 40, 5, 136])),
    dtype=st.sampled_from(HALVES),
    seed=st.integers(0, 1000),
)
def test_odd_sizes_in_16_bits(kind, text_len, grid, radius, sizes, dtype, seed, device):
    mask = AttentionMask(kind, text_len, *grid, kernel=2 * radius + 1)
    assert_no_worse_than_torch(qkv(mask, *sizes, seed=seed, dtype=dtype, device=device), mask)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind, device):
    mask = SMALL[kind]
    tensors = [x.requires_grad_() for x in qkv(mask, 1, 2, 4, device=device)]
    arguments = (*tensors, *mask_args(mask), 0.5)
    torch.library.opcheck(torch.ops.dalle_fast.sparse_attention, arguments)
    with torch.no_grad():
        out, lse = torch.ops.dalle_fast.sparse_attention(*arguments)
    backward = (torch.ones_like(out), *(x.detach() for x in tensors), out, lse, *arguments[3:])
    torch.library.opcheck(torch.ops.dalle_fast.sparse_attention_backward, backward)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("scale", [0.25, -0.5])
@pytest.mark.parametrize("masks", [LARGE, WIDE], ids=["large", "wide"])
def test_log_sum_exp(masks, scale, dtype, device):
    """As precise as a float32, for inputs of any dtype."""
    for mask in masks.values():
        q, k, v = qkv(mask, 1, 2, dtype=dtype, device=device)
        _, lse = torch.ops.dalle_fast.sparse_attention(q, k, v, *mask_args(mask), scale)
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        scores = (q.double() @ k.double().mT * scale).masked_fill(~mask.dense().to(device), float("-inf"))
        assert error(lse, scores.logsumexp(-1)) <= (1e-12 if dtype == torch.float64 else FORWARD)


LAYOUTS = {
    "heads last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first": lambda x: x.mT.contiguous().mT,
    "every other channel": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
    "one head for all": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["column", "conv"])
def test_any_strides(layout, kind, dtype, device):
    tensors = [LAYOUTS[layout](x) for x in qkv(SMALL[kind], dtype=dtype, device=device)]
    assert not tensors[0].is_contiguous()
    assert_equal(run(df, tensors, SMALL[kind]), run(df, [x.contiguous() for x in tensors], SMALL[kind]))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_packed_projection(dtype, device):
    """q, k and v as views of one [B, N, 3, H, D]."""
    mask = LARGE["column"]
    packed = normal(2, mask.seq_len, 3, 2, 32, dtype=dtype, device=device)
    views = [x.transpose(1, 2) for x in packed.unbind(2)]
    assert_equal(run(df, views, mask), run(df, [x.contiguous() for x in views], mask))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "pad"), [(3, 2), (16, 2), (16, 8)])
def test_reads_nothing_outside_its_inputs(kind, channels, pad, dtype, device):
    mask = SMALL[kind]
    tensors = qkv(mask, channels=channels, dtype=dtype, device=device)
    assert_equal(run(df, [surrounded(x, pad) for x in tensors], mask), run(df, tensors, mask))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_tokens_have_no_influence(kind, dtype, device):
    """A change of key and value j changes exactly the rows that see j."""
    mask = SMALL[kind]
    q, k, v = qkv(mask, 1, 1, dtype=dtype, device=device)
    before = df.sparse_attention(q, k, v, mask)
    for token in range(mask.seq_len):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, token] += 1
        v2[:, :, token] -= 1
        changed = (df.sparse_attention(q, k2, v2, mask) != before).any(-1)[0, 0]
        assert torch.equal(changed.cpu(), mask.dense()[:, token])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_every_run_and_on_any_number_of_threads(kind, dtype, device):
    tensors = qkv(LARGE[kind], 1, 1, dtype=dtype, device=device)
    same_on_any_number_of_threads(lambda: run(df, tensors, LARGE[kind]))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_large_scores_stay_finite(dtype, device):
    """Scores of tens of thousands: the exponentials neither overflow nor all vanish."""
    mask = SMALL["row"]
    tensors = [100 * x for x in qkv(mask, dtype=dtype, device=device)]
    out, *gradients = run(df, tensors, mask)
    wanted = reference.sparse_attention(*(x.double() for x in tensors), mask)
    assert error(out, wanted) <= (FORWARD if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_merging_heads_is_free(device):
    mask = SMALL["row"]
    out = df.sparse_attention(*qkv(mask, device=device), mask)
    assert out.transpose(1, 2).is_contiguous()


def test_compiles_without_a_graph_break(device):
    mask = SMALL["conv"]
    tensors = qkv(mask, device=device)
    compiled = torch.compile(
        lambda q, k, v: df.sparse_attention(q, k, v, mask) * 2, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(*tensors), df.sparse_attention(*tensors, mask) * 2)


MASK = SMALL["row"]
GOOD = torch.zeros(2, 3, MASK.seq_len, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "mask", "kind", "message"),
    [
        (GOOD[0], GOOD, GOOD, MASK, ValueError, r"q: expected \[B, H, N, D\], got \[3, 17, 8\]"),
        (GOOD[:0], GOOD[:0], GOOD[:0], MASK, ValueError, r"q: expected a non-empty .* got \[0, 3, 17, 8\]"),
        (GOOD, GOOD[:, :2], GOOD, MASK, ValueError, r"k: expected \[2, 3, 17, 8\], got \[2, 2, 17, 8\]"),
        (GOOD, GOOD, GOOD[..., :7], MASK, ValueError, r"v: expected \[2, 3, 17, 8\], got \[2, 3, 17, 7\]"),
        (GOOD[:, :, 1:], GOOD[:, :, 1:], GOOD[:, :, 1:], MASK, ValueError, "q: expected N = 17 tokens, .* got 16"),
        (GOOD.int(), GOOD, GOOD, MASK, TypeError, "q: expected torch.float32 or .* got torch.int32"),
        (GOOD, GOOD.double(), GOOD, MASK, TypeError, "k: expected torch.float32, got torch.float64"),
        (GOOD, GOOD, None, MASK, TypeError, "v: expected a tensor, got NoneType"),
        (GOOD, GOOD, GOOD, "row", TypeError, "mask: expected an AttentionMask, got str"),
        (GOOD, GOOD, GOOD.to("meta"), MASK, ValueError, "v: expected a tensor on cpu, got one on meta"),
    ],
)
def test_bad_input(q, k, v, mask, kind, message):
    with pytest.raises(kind, match=message):
        df.sparse_attention(q, k, v, mask)


def test_the_op_itself_guards_memory():
    """Direct calls skip the Python checks, and still cannot read past a tensor."""
    with pytest.raises(RuntimeError, match="q: expected N = 17 tokens, got 16"):
        torch.ops.dalle_fast.sparse_attention(*[GOOD[:, :, 1:]] * 3, *mask_args(MASK), 1.0)
    with pytest.raises(RuntimeError, match=r"mask: expected sizes .* width 3, kernel 2147483647"):
        torch.ops.dalle_fast.sparse_attention(GOOD, GOOD, GOOD, 3, 5, 4, 3, 2**31 - 1, 1.0)
    kinds = len(KINDS)
    with pytest.raises(RuntimeError, match=f"mask kind: expected 0 to {kinds - 1}, got {kinds}"):
        torch.ops.dalle_fast.sparse_attention(GOOD, GOOD, GOOD, kinds, 5, 4, 3, 3, 1.0)
