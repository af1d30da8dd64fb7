"""Sparse attention: every query sees the keys that its mask keeps (section 2.2, appendix B.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..mask import AttentionMask
from ._check import HALVES, check_tensor
from ._library import reference_op, refuse_forward_mode, register_autograd, register_fake

DTYPES = (torch.float32, *HALVES, torch.float64)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float | None = None) -> Tensor:
    """Softmax attention over the keys that ``mask`` keeps, without an N x N matrix at any time.

    Differentiable once with respect to q, k and v, not in forward mode. Every run gives the same bits.

    Args:
        q, k, v: [B, H, N, D] of any strides, all of one dtype: float32, bfloat16, float16 or float64. Sums are float32
            or float64.
        mask: its ``seq_len`` is N.
        scale: factor on q @ k^T; D^-0.5 by default.

    Returns:
        [B, H, N, D]; the heads of a token lie side by side in memory, so merging them copies nothing.

    Raises:
        TypeError: an argument that is no tensor or no mask, or another dtype.
        ValueError: shapes that do not fit each other or the mask, an empty batch, different devices.
        RuntimeError: a derivative that the kernels do not have; this install has no kernel for the device.
    """
    check_mask(mask)
    check_tensor("q", q, DTYPES, ("B", "H", "N", "D"))
    check_tensor("k", k, q.dtype, q.shape, q.device)
    check_tensor("v", v, q.dtype, q.shape, q.device)
    if q.shape[2] != mask.seq_len:
        raise ValueError(f"q: expected N = {mask.seq_len} tokens, as in the mask, got {q.shape[2]}")
    if reference := reference_op("sparse_attention", q.device):
        return reference(q, k, v, mask, scale)
    refuse_forward_mode("sparse_attention: differentiable once", q, k, v)
    out, _ = torch.ops.dalle_fast.sparse_attention(q, k, v, *mask_args(mask), softmax_scale(q, scale))
    return out


def check_mask(mask: AttentionMask) -> None:
    if not isinstance(mask, AttentionMask):
        raise TypeError(f"mask: expected an AttentionMask, got {type(mask).__name__}")


def mask_args(mask: AttentionMask) -> tuple[int, int, int, int, int]:
    """The mask as the ops take it: kind, text_len, height, width, kernel."""
    return mask.kind_id, mask.text_len, mask.height, mask.width, mask.kernel


def softmax_scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def _new_heads(q: Tensor) -> Tensor:
    batch, heads, tokens, channels = q.shape
    return q.new_empty(batch, tokens, heads, channels).transpose(1, 2)


@register_fake("sparse_attention")
def _sparse_attention_fake(q: Tensor, k: Tensor, v: Tensor, *mask_and_scale: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return _new_heads(q), q.new_empty(q.shape[:3], dtype=lse_dtype)


@register_fake("sparse_attention_backward")
def _sparse_attention_backward_fake(dout: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_heads(q), _new_heads(q), _new_heads(q)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.mask_and_scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    gradients = torch.ops.dalle_fast.sparse_attention_backward(dout, q, k, v, out, lse, *ctx.mask_and_scale)
    return (*gradients, *(None for _ in ctx.mask_and_scale))


register_autograd("sparse_attention", _backward, setup_context=_setup_context)
