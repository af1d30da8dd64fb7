"""Decode attention: one step of sampling from caches that keep only what each mask can still see."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..mask import AttentionMask
from ._library import kernels_loaded, reference_op
from .sparse_attention import DTYPES, check_mask, check_tensors, mask_args, softmax_scale


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    position: Tensor,
    mask: AttentionMask,
    scale: float | None = None,
) -> Tensor:
    """Store the key and value of one new image token per candidate, then attend from it.

    Row ``text_len + position`` of ``sparse_attention``, without gradients. Slots are those of
    ``reference.cache_slot``; slots that the mask no longer sees are never read. A candidate's result is the same bits
    however many candidates there are.

    Args:
        q, k, v: [C, H, D], the new token of each candidate; float32, bfloat16, float16 or float64, all of one dtype.
        text_k, text_v: [P, H, text_len, D], each prompt shared by C / P consecutive candidates, which read it once.
        cache_k, cache_v: [C, H, mask.cache_len, D], written in place. Like the text, of any strides; contiguous is
            the fastest, since a step reads them from end to end.
        position: int64 scalar, the raster index of the new token; the tokens before it are in the caches already. On
            CUDA the host does not wait for it, so that steps can be recorded as a CUDA graph.
        mask: the layer's mask.
        scale: factor on the scores; D^-0.5 by default.

    Returns:
        [C, H, D], contiguous. On CUDA, NaN for a position outside the image, and the caches stay as they were.

    Raises:
        TypeError: an argument that is no tensor or no mask, or another dtype.
        ValueError: shapes that do not fit each other or the mask, an empty batch, different devices.
        RuntimeError: on the CPU a position outside the image; this install has no kernel for the device.
    """
    check_mask(mask)
    check_tensors(DTYPES, q=q)
    if reference := reference_op("decode_attention", q.device):
        _check_arguments(q, k, v, text_k, text_v, cache_k, cache_v, position, mask)
        return reference(q, k, v, text_k, text_v, cache_k, cache_v, position, mask, scale)
    try:
        return torch.ops.dalle_fast.decode_attention(
            q, k, v, text_k, text_v, cache_k, cache_v, position, *mask_args(mask), softmax_scale(q, scale)
        )
    except RuntimeError:
        # The op has checked all that matters and touched nothing. A step takes microseconds, so what exactly is wrong
        # is only looked for when something is.
        _check_arguments(q, k, v, text_k, text_v, cache_k, cache_v, position, mask)
        raise


def _check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor,
    text_v: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    position: Tensor,
    mask: AttentionMask,
) -> None:
    check_tensors(DTYPES, q=q, k=k, v=v, text_k=text_k, text_v=text_v, cache_k=cache_k, cache_v=cache_v)
    check_tensors((torch.int64,), position=position)
    if q.ndim != 3 or q.numel() == 0:
        raise ValueError(f"q: expected a non-empty [C, H, D], got {list(q.shape)}")
    candidates, heads, channels = q.shape
    if text_k.ndim != 4 or text_k.shape[0] == 0 or candidates % text_k.shape[0]:
        raise ValueError(
            f"text_k: expected [P, H, text_len, D] with C = {candidates} a multiple of P, got {list(text_k.shape)}"
        )
    text_shape = [text_k.shape[0], heads, mask.text_len, channels]
    cache_shape = [candidates, heads, mask.cache_len, channels]
    expected = [(k, q.shape), (v, q.shape), (text_k, text_shape), (text_v, text_shape)]
    expected += [(cache_k, cache_shape), (cache_v, cache_shape)]
    for name, (x, shape) in zip(("k", "v", "text_k", "text_v", "cache_k", "cache_v"), expected, strict=True):
        if list(x.shape) != list(shape):
            raise ValueError(f"{name}: expected {list(shape)}, got {list(x.shape)}")
    if position.ndim != 0 or position.device != q.device:
        raise ValueError(f"position: expected a scalar on {q.device}, got {list(position.shape)} on {position.device}")


def _fake(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


if kernels_loaded():
    torch.library.register_fake("dalle_fast::decode_attention")(_fake)
