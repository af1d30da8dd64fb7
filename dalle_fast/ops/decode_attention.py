"""Decode attention: one step of sampling, from caches that keep only the tokens that the mask still sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..mask import AttentionMask
from ._check import check_tensor
from ._library import reference_op, refuse_gradients, register_fake
from .sparse_attention import DTYPES, check_mask, mask_args, softmax_scale


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

    Row ``text_len + position`` of ``sparse_attention``, without gradients. The slots of the caches are those of
    ``AttentionMask.cache_slot``; those that the mask no longer sees are never read. The bits of a candidate's result do
    not depend on the number of candidates.

    Args:
        q, k, v: [C, H, D], the new token of each candidate; float32, bfloat16, float16 or float64, all of one dtype.
        text_k, text_v: [P, H, text_len, D], each prompt shared by C / P consecutive candidates, which read it once.
        cache_k, cache_v: [C, H, mask.cache_len, D], written in place. Like the text, of any strides, if no two elements
            overlap in memory; contiguous is fastest, since a step reads them from end to end.
        position: int64 scalar, the raster index of the new token; the tokens before it are in the caches already. On
            CUDA the host does not wait for it, so that steps can be recorded as a CUDA graph.
        mask: the layer's mask.
        scale: factor on the scores; D^-0.5 by default.

    Returns:
        [C, H, D], contiguous. On CUDA, NaN for a position outside the image, and the caches stay as they were.

    Raises:
        TypeError: an argument that is no tensor or no mask, or another dtype.
        ValueError: shapes that do not fit each other or the mask, an empty batch, different devices.
        RuntimeError: an argument that requires gradients; caches that overlap in memory; on the CPU a position outside
            the image; this install has no kernel for the device.
    """
    check_mask(mask)
    check_tensor("q", q, DTYPES)
    refuse_gradients("decode_attention", q, k, v, text_k, text_v, cache_k, cache_v)
    for cache in (cache_k, cache_v):
        if isinstance(cache, Tensor) and cache.requires_grad:
            raise RuntimeError("decode_attention: expected caches that do not require gradients: it writes to them")
    if reference := reference_op("decode_attention", q.device):
        _check_arguments(q, k, v, text_k, text_v, cache_k, cache_v, position, mask)
        return reference(q, k, v, text_k, text_v, cache_k, cache_v, position, mask, scale)
    try:
        return torch.ops.dalle_fast.decode_attention(
            q, k, v, text_k, text_v, cache_k, cache_v, position, *mask_args(mask), softmax_scale(q, scale)
        )
    except RuntimeError:
        # For the speed of sampling, which calls this once per layer and step: the checks take 10 us, as long as a small
        # call. The op has checked everything and written nothing; the checks only say what is wrong.
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
    check_tensor("q", q, DTYPES, ("C", "H", "D"))
    candidates, heads, channels = q.shape
    check_tensor("k", k, q.dtype, q.shape, q.device)
    check_tensor("v", v, q.dtype, q.shape, q.device)
    check_tensor("text_k", text_k, q.dtype, ("P", heads, mask.text_len, channels), q.device)
    if candidates % text_k.shape[0]:
        raise ValueError(f"text_k: expected P to divide C = {candidates}, got {text_k.shape[0]}")
    check_tensor("text_v", text_v, q.dtype, text_k.shape, q.device)
    for name, cache in (("cache_k", cache_k), ("cache_v", cache_v)):
        check_tensor(name, cache, q.dtype, (candidates, heads, mask.cache_len, channels), q.device)
    check_tensor("position", position, torch.int64, (), q.device)


@register_fake("decode_attention")
def _decode_attention_fake(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)
