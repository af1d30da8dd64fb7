"""Gumbel-softmax relaxation of the quantizer, alone and multiplied by the codebook (section 2.1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._check import HALVES, check_tensor, int64_scalar
from ._library import reference_op, refuse_forward_mode, register_autograd, register_fake

DTYPES = (torch.float32, torch.float64, *HALVES)


def gumbel_softmax(logits: Tensor, tau: float, seed: int | Tensor, hard: bool = False) -> tuple[Tensor, Tensor]:
    """Relaxed one-hot sample over the codes, and the KL divergence to the uniform prior (section 2.1).

    A public op, for your own model: the dVAE of this package uses :func:`gumbel_quantize`. Differentiable
    once, not in forward mode.

    Args:
        logits: [B, K, h, w], float32, float64, bfloat16 or float16 (16 bits are computed in float32), contiguous or
            channels_last (another layout is copied).
        tau: temperature, positive; the sample tends to a one-hot as it tends to 0.
        seed: of the Gumbel noise: an int, or an int64 tensor of one element, best on the device of logits, where
            nothing waits for it. The noise is a function of seed and logical element index alone, and the backward
            computes it again, so none is stored.
        hard: return exact one-hots, with the gradient of the soft sample (straight-through).

    Returns:
        y: the sample, as logits.
        kl: [B], KL(softmax(logits) || uniform) in nats, summed over the grid; float32 for logits of 16 bits.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: logits of another rank or empty, ``tau`` not a positive number, ``seed`` beyond 64 bits.
        RuntimeError: a derivative that the kernels do not have; this install has no kernel for the device.
    """
    tau, seed = _checked(logits, tau, seed)
    if reference := reference_op("gumbel_softmax", logits.device):
        return reference(logits, tau, seed, hard)
    refuse_forward_mode("gumbel_softmax: differentiable once", logits)
    y, kl, _, _ = torch.ops.dalle_fast.gumbel_softmax(_dense(logits), tau, seed, hard)
    return y, kl


def _checked(logits: Tensor, tau: float, seed: int | Tensor) -> tuple[float, Tensor]:
    """tau as a float and seed as an int64 scalar on the device of logits, all three checked."""
    check_tensor("logits", logits, DTYPES, ("B", "K", "h", "w"))
    if not 0 < float(tau) < float("inf"):
        raise ValueError(f"tau: expected a finite positive number, got {tau}")
    return float(tau), int64_scalar("seed", seed, logits.device)


def _dense(x: Tensor) -> Tensor:
    """x in one of the two layouts of the kernels: contiguous or channels_last."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _statistics(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty kl [B], codes [B, h, w] and stats [B, 4, h, w] (csrc/gumbel/gumbel.h), as the kernels return them."""
    batch, _, height, width = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    kl, stats = logits.new_empty(batch, dtype=dtype), logits.new_empty(batch, 4, height, width, dtype=dtype)
    return kl, logits.new_empty((batch, height, width), dtype=torch.int64), stats


@register_fake("gumbel_softmax")
def _gumbel_softmax_fake(logits: Tensor, tau: float, seed: Tensor, hard: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(logits), *_statistics(logits)


@register_fake("gumbel_softmax_backward")
def _gumbel_softmax_backward_fake(
    grad_y: Tensor, grad_kl: Tensor, logits: Tensor, stats: Tensor, tau: float, seed: Tensor
) -> Tensor:
    return torch.empty_like(logits)


def _setup_softmax(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ctx.tau, seed, _ = inputs
    _, _, codes, stats = output
    ctx.mark_non_differentiable(codes, stats)
    ctx.save_for_backward(logits, stats, seed)


def _softmax_backward(ctx: Any, grad_y: Tensor, grad_kl: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits, stats, seed = ctx.saved_tensors
    grad_logits = torch.ops.dalle_fast.gumbel_softmax_backward(
        _dense(grad_y), grad_kl.contiguous(), logits, stats, ctx.tau, seed
    )
    return grad_logits, None, None, None


register_autograd("gumbel_softmax", _softmax_backward, setup_context=_setup_softmax)


def gumbel_quantize(
    logits: Tensor, codebook: Tensor, tau: float, seed: int | Tensor, hard: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`gumbel_softmax` multiplied by the codebook: the decoder's first 1x1 convolution (section 2.1).

    The sample itself is never in memory. Differentiable once, not in forward mode.

    Args:
        logits, tau, seed, hard: as in :func:`gumbel_softmax`.
        codebook: [K, C], the dtype of logits.

    Returns:
        z: [B, C, h, w], in the memory layout of logits.
        kl: [B], as in :func:`gumbel_softmax`.
        codes: [B, h, w], int64, argmax of the noisy logits.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`gumbel_softmax`, or a codebook of another dtype, shape or
            device.
    """
    tau, seed = _checked(logits, tau, seed)
    check_tensor("codebook", codebook, logits.dtype, (logits.shape[1], "C"), logits.device)
    if reference := reference_op("gumbel_quantize", logits.device):
        return reference(logits, codebook, tau, seed, hard)
    refuse_forward_mode("gumbel_quantize: differentiable once", logits, codebook)
    z, kl, codes, _, _ = torch.ops.dalle_fast.gumbel_quantize(_dense(logits), codebook.contiguous(), tau, seed, hard)
    return z, kl, codes


@register_fake("gumbel_quantize")
def _gumbel_quantize_fake(
    logits: Tensor, codebook: Tensor, tau: float, seed: Tensor, hard: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, height, width = logits.shape
    channels = codebook.shape[1]
    layout = torch.contiguous_format if logits.is_contiguous() else torch.channels_last
    z = torch.empty((batch, channels, height, width), dtype=logits.dtype, device=logits.device, memory_format=layout)
    kl, codes, stats = _statistics(logits)
    return z, kl, codes, stats, kl.new_empty(batch, height * width, channels)


@register_fake("gumbel_quantize_backward")
def _gumbel_quantize_backward_fake(
    grad_z: Tensor,
    grad_kl: Tensor,
    logits: Tensor,
    codebook: Tensor,
    codes: Tensor,
    stats: Tensor,
    soft: Tensor,
    tau: float,
    seed: Tensor,
    hard: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), torch.empty_like(codebook)


def _setup_quantize(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, codebook, ctx.tau, seed, ctx.hard = inputs
    _, _, codes, stats, soft = output
    ctx.mark_non_differentiable(codes, stats, soft)
    ctx.save_for_backward(logits, codebook, codes, stats, soft, seed)


def _quantize_backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *saved, seed = ctx.saved_tensors
    grad_logits, grad_codebook = torch.ops.dalle_fast.gumbel_quantize_backward(
        _dense(grad_z), grad_kl.contiguous(), *saved, ctx.tau, seed, ctx.hard
    )
    return grad_logits, grad_codebook, None, None, None


register_autograd("gumbel_quantize", _quantize_backward, setup_context=_setup_quantize)


# The noise alone: a compiled op without a public function, whose bits the tests compare with the reference.
@register_fake("philox_uniform")
def _philox_uniform_fake(seed: Tensor, first: int, n: int) -> Tensor:
    return seed.new_empty(n, dtype=torch.float32)
