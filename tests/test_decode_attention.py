"""Decode attention against its definition and against the rows of sparse attention, at every position."""

from __future__ import annotations

import pytest
import torch
from conftest import CUDA_ON_CPU
from helpers.op_checks import HALVES, normal, same_on_any_number_of_threads, surrounded
from helpers.tolerances import FORWARD, HALF, error

import dalle_fast as df
from dalle_fast import AttentionMask, reference
from dalle_fast.mask import KINDS
from dalle_fast.ops.sparse_attention import mask_args

MASKS = [
    AttentionMask(kind, text_len, height, width, kernel)
    for kind in KINDS
    for text_len, height, width, kernel in [(5, 4, 3, 3), (0, 3, 5, 5), (7, 1, 4, 11), (2, 6, 1, 3)]
]


def to(device, arguments):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]


def stream(mask, prompts=2, repeat=3, heads=2, channels=8, dtype=torch.float32, device="cpu"):
    """q, k, v [C, H, N, D] of whole streams; the candidates of a prompt share its text."""
    q, k, v = (normal(prompts * repeat, heads, mask.seq_len, channels, seed=i, dtype=dtype) for i in range(3))
    for x in (k, v):
        x[:, :, : mask.text_len] = x[::repeat, :, : mask.text_len].repeat_interleave(repeat, 0)
    return to(device, (q, k, v))


def caches(mask, k, fill=torch.nan):
    """Caches whose first content must never be read."""
    return [k.new_full((*k.shape[:2], mask.cache_len, k.shape[3]), fill) for _ in range(2)]


def decode_all(module, mask, q, k, v, repeat=3, scale=None):
    """The image rows, [C, H, image_len, D], one step at a time; and the final caches."""
    text_k, text_v = (x[::repeat, :, : mask.text_len] for x in (k, v))
    cache_k, cache_v = caches(mask, k)
    rows = []
    for position in range(mask.image_len):
        new = (x[:, :, mask.text_len + position] for x in (q, k, v))
        here = torch.tensor(position, device=q.device)
        rows.append(module.decode_attention(*new, text_k, text_v, cache_k, cache_v, here, mask, scale))
    return torch.stack(rows, 2), cache_k, cache_v


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_equals_the_rows_of_sparse_attention(mask, device):
    q, k, v = stream(mask, device=device)
    exact = reference.sparse_attention(q.double(), k.double(), v.double(), mask)[:, :, mask.text_len :]
    rows, cache_k, cache_v = decode_all(df, mask, q, k, v)
    assert error(rows, exact) <= FORWARD
    slots = mask.cache_slot(torch.arange(mask.image_len)).tolist()
    for position in range(mask.image_len - 1, -1, -1):  # a later token may have taken the slot
        if slots[position] not in slots[position + 1 :]:
            assert torch.equal(cache_k[:, :, slots[position]], k[:, :, mask.text_len + position])
            assert torch.equal(cache_v[:, :, slots[position]], v[:, :, mask.text_len + position])


@pytest.mark.parametrize("mask", MASKS[::4], ids=str)
def test_matches_the_reference(mask, device):
    tensors = stream(mask, dtype=torch.float64, device=device)
    ours, theirs = (decode_all(module, mask, *tensors, scale=0.2) for module in (df, reference))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-12)
    for cache, wanted in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(cache, wanted)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mask", MASKS[::4], ids=str)
def test_16_bits_are_no_worse_than_torch(mask, dtype, device):
    tensors = stream(mask, dtype=dtype, device=device)
    exact = decode_all(reference, mask, *(x.double() for x in tensors))[0]
    ours, theirs = (decode_all(module, mask, *tensors)[0] for module in (df, reference))
    assert ours.dtype == dtype
    assert error(ours, exact) <= HALF * error(theirs, exact)


def step(mask, position, candidates, prompts=1, heads=2, channels=16, dtype=torch.float32, device="cpu"):
    """Arguments of one step in the middle of an image; the slots that the mask does not see are NaN."""
    new = [normal(candidates, heads, channels, seed=i, dtype=dtype) for i in range(3)]
    text = [normal(prompts, heads, mask.text_len, channels, seed=i, dtype=dtype) for i in (3, 4)]
    cache = caches(mask, new[0][:, :, None].expand(-1, -1, mask.cache_len, -1))
    past = torch.arange(position)
    seen = past[mask.keep(torch.tensor(mask.text_len + position), mask.text_len + past)]
    for i, x in enumerate(cache):
        x[:, :, mask.cache_slot(seen)] = normal(candidates, heads, len(seen), channels, seed=5 + i, dtype=dtype)
    return to(device, (*new, *text, *cache, torch.tensor(position), mask))


def copied(arguments):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [16, 64, 5, 24])
def test_any_number_of_candidates(kind, channels, device):
    """One by one, in groups of eight, and in blocks of 32; texts and windows of more than a piece of 64 keys."""
    mask = AttentionMask(kind, 150, 9, 11, 5)
    for candidates, prompts in ((1, 1), (2, 1), (3, 1), (8, 1), (12, 4), (26, 2), (43, 1), (80, 2)):
        arguments = step(mask, 90, candidates, prompts, channels=channels, device=device)
        exact = reference.decode_attention(*(x.double() if i < 7 else x for i, x in enumerate(copied(arguments))))
        assert error(df.decode_attention(*arguments), exact) <= FORWARD


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["full", "conv"])
@pytest.mark.parametrize("channels", [16, 40, 64, 128])
def test_any_number_of_candidates_in_16_bits(kind, channels, dtype, device):
    """Parts of a strip of 16 and of a block of 32, and more; a text of more than two steps of 128 keys."""
    mask = AttentionMask(kind, 300, 9, 11, 5)
    for candidates, prompts in ((1, 1), (17, 1), (80, 2)):
        arguments = step(mask, 90, candidates, prompts, channels=channels, dtype=dtype, device=device)
        exact = reference.decode_attention(*(x.double() if i < 7 else x for i, x in enumerate(copied(arguments))))
        theirs = reference.decode_attention(*copied(arguments))
        assert error(df.decode_attention(*arguments), exact) <= HALF * error(theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("channels", [64, 5])
def test_a_candidate_does_not_depend_on_the_others(dtype, channels, device):
    arguments = step(AttentionMask("conv", 70, 5, 6, 3), 20, 43, channels=channels, dtype=dtype, device=device)
    many = df.decode_attention(*copied(arguments))
    for few in (1, 2, 5, 9, 35):
        first = [x[:few] if i not in (3, 4, 7, 8) else x for i, x in enumerate(copied(arguments))]
        assert torch.equal(df.decode_attention(*first), many[:few])


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("candidates", [1, 20])
def test_any_layout_of_the_text(dtype, candidates, device):
    """As projected, [P, T, H, D]; and transposed, [P, H, D, T]."""
    mask = AttentionMask("row", 70, 5, 6)
    arguments = step(mask, 20, candidates, dtype=dtype, device=device)
    wanted = df.decode_attention(*copied(arguments))
    for order in ((0, 2, 1, 3), (0, 1, 3, 2)):
        turned = [x.permute(order).contiguous().permute(order) for x in arguments[3:5]]
        assert torch.equal(df.decode_attention(*copied(arguments[:3]), *turned, *copied(arguments[5:])), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_same_bits_on_any_number_of_threads(dtype):
    arguments = step(AttentionMask("conv", 70, 5, 6, 3), 20, 43, dtype=dtype)
    same_on_any_number_of_threads(lambda: [df.decode_attention(*copied(arguments))])


@pytest.mark.parametrize("mask", MASKS[::4], ids=str)
def test_any_strides_and_no_reads_outside(mask, device):
    q, k, v = stream(mask, device=device)
    wanted = decode_all(df, mask, q, k, v)[0]
    strided = [surrounded(x, pad=1, step=2) for x in (q, k, v)]
    assert error(decode_all(df, mask, *strided)[0], wanted.double()) <= FORWARD


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    mask = AttentionMask(kind, 3, 2, 2, 3)
    q, k, v = stream(mask, 1, 2)
    text = (x[:1, :, :3] for x in (k, v))
    new = (x[:, :, 3] for x in (q, k, v))
    arguments = (*new, *text, *caches(mask, k, fill=0.0), torch.tensor(0), *mask_args(mask), 0.5)
    torch.library.opcheck(torch.ops.dalle_fast.decode_attention, arguments)


def good():
    mask = AttentionMask("row", 3, 2, 4)
    q, k, v = stream(mask, 1, 2)
    cache_k, cache_v = caches(mask, k)
    names = ("q", "k", "v", "text_k", "text_v", "cache_k", "cache_v", "position", "mask")
    text = (x[:1, :, :3] for x in (k, v))
    return dict(
        zip(names, (*(x[:, :, 3] for x in (q, k, v)), *text, cache_k, cache_v, torch.tensor(0), mask), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "change", "kind", "message"),
    [
        ("q", lambda x: x[0], ValueError, r"q: expected \[C, H, D\], got \[2, 8\]"),
        ("q", lambda x: x.double(), TypeError, "k: expected torch.float64, got torch.float32"),
        ("k", lambda x: x[:1], ValueError, r"k: expected \[2, 2, 8\], got \[1, 2, 8\]"),
        ("text_k", lambda x: x.repeat(3, 1, 1, 1), ValueError, "text_k: expected P to divide C = 2, got 3"),
        ("text_v", lambda x: x[:, :, 1:], ValueError, r"text_v: expected \[1, 2, 3, 8\], got \[1, 2, 2, 8\]"),
        ("cache_k", lambda x: x[:, :, 1:], ValueError, r"cache_k: expected \[2, 2, 5, 8\], got \[2, 2, 4, 8\]"),
        ("position", lambda x: x[None], ValueError, r"position: expected \[\], got \[1\]"),
        ("position", lambda x: x.float(), TypeError, "position: expected torch.int64, got torch.float32"),
        ("v", lambda x: None, TypeError, "v: expected a tensor, got NoneType"),
        ("mask", lambda x: None, TypeError, "mask: expected an AttentionMask, got NoneType"),
    ],
)
def test_bad_input(name, change, kind, message):
    arguments = good()
    arguments[name] = change(arguments[name])
    untouched = [x.clone() for x in (arguments["cache_k"], arguments["cache_v"])]
    with pytest.raises(kind, match=message):
        df.decode_attention(**arguments)
    for cache, before in zip((arguments["cache_k"], arguments["cache_v"]), untouched, strict=True):
        assert torch.equal(cache.isnan(), before.isnan())


@pytest.mark.parametrize("position", [-1, 8, 2**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_position_outside_the_image_moves_no_address(position, dtype, device):
    """The CPU refuses it. On CUDA, where the host does not wait for the position, the result is NaN."""
    mask = AttentionMask("row", 3, 2, 4)
    arguments = step(mask, 7, 2, dtype=dtype, device=device)
    arguments[-2].fill_(position)
    before = copied(arguments)
    if CUDA_ON_CPU or device.type == "cuda":
        assert df.decode_attention(*arguments).isnan().all()
    else:
        with pytest.raises(RuntimeError, match=f"position: expected 0 to 7, got {position}"):
            df.decode_attention(*arguments)
    for cache, untouched in zip(arguments[5:7], before[5:7], strict=True):
        assert torch.equal(cache.nan_to_num(0.0), untouched.nan_to_num(0.0))
