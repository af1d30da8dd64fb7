"""Gumbel-softmax relaxation of the quantizer, and its product with the codebook (section 2.1)."""

from __future__ import annotations

from typing import Any

import torch

from ._library import kernels_loaded, reference_op


def gumbel_softmax(
    logits: torch.Tensor, tau: float, seed: int | torch.Tensor, hard: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Relaxed one-hot sample over the codes, and the KL divergence to the uniform prior (section 2.1).

    Args:
        logits: [B, K, h, w], float32, float64, bfloat16 or float16 (16 bits are computed in float32), contiguous or
            channels_last (another layout is copied).
        tau: temperature, positive; the sample tends to a one-hot as it tends to 0.
        seed: of the Gumbel noise: an int, or an int64 tensor of one element, best on the device of logits, where
            nothing waits for it. The noise is a function of seed and logical element index alone, and the backward
            draws it again, so none is stored.
        hard: return exact one-hots, with the gradient of the soft sample (straight-through).

    Returns:
        y: the sample, as logits.
        kl: [B], KL(softmax(logits) || uniform) in nats, summed over the grid; float32 for logits of 16 bits.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: logits of another rank or empty, ``tau`` not a positive number, ``seed`` beyond 64 bits.
    """
    tau, seed = _checked(logits, tau, seed)
    if reference := reference_op("gumbel_softmax", logits.device):
        return reference(logits, tau, seed, hard)
    y, kl, _, _ = torch.ops.dalle_fast.gumbel_softmax(_dense(logits), tau, seed, hard)
    return y, kl


def gumbel_quantize(
    logits: torch.Tensor, codebook: torch.Tensor, tau: float, seed: int | torch.Tensor, hard: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`gumbel_softmax` times the codebook: the decoder's first 1x1 convolution (section 2.1).

    The sample itself is never in memory.

    Args:
        logits, tau, seed, hard: as in :func:`gumbel_softmax`.
        codebook: [K, C], the dtype of logits.

    Returns:
        z: [B, C, h, w], in the memory layout of logits.
        kl: [B], as in :func:`gumbel_softmax`.
        codes: [B, h, w], int64, argmax of the noisy logits.

    Raises:
        TypeError, ValueError: as in :func:`gumbel_softmax`, or a codebook of another shape or dtype.
    """
    tau, seed = _checked(logits, tau, seed)
    if codebook.dim() != 2 or codebook.shape[0] != logits.shape[1] or codebook.shape[1] == 0:
        raise ValueError(f"codebook: expected [{logits.shape[1]}, C], got {list(codebook.shape)}")
    if codebook.dtype != logits.dtype or codebook.device != logits.device:
        raise TypeError(
            f"codebook: expected {logits.dtype} on {logits.device}, got {codebook.dtype} on {codebook.device}"
        )
    if reference := reference_op("gumbel_quantize", logits.device):
        return reference(logits, codebook, tau, seed, hard)
    z, kl, codes, _, _ = torch.ops.dalle_fast.gumbel_quantize(_dense(logits), codebook.contiguous(), tau, seed, hard)
    return z, kl, codes


def int64_tensor(value: int | torch.Tensor, name: str, device: torch.device) -> torch.Tensor:
    """The value as an int64 scalar on the device, or an error."""
    if isinstance(value, torch.Tensor):
        if value.dtype != torch.int64 or value.numel() != 1:
            raise TypeError(f"{name}: expected an int64 tensor of one element, got {value.dtype} {list(value.shape)}")
        return value.reshape(()).to(device)
    if not isinstance(value, int):
        raise TypeError(f"{name}: expected an int or an int64 tensor, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected 64 bits with a sign, got {value}")
    return torch.tensor(value, dtype=torch.int64, device=device)


def _checked(logits: torch.Tensor, tau: float, seed: int | torch.Tensor) -> tuple[float, torch.Tensor]:
    """tau as a float and seed as an int64 tensor on the device of logits, or an error."""
    if logits.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"logits: expected float32, float64, bfloat16 or float16, got {logits.dtype}")
    if logits.dim() != 4 or logits.numel() == 0:
        raise ValueError(f"logits: expected a non-empty [B, K, h, w], got {list(logits.shape)}")
    if not float(tau) > 0 or float(tau) == float("inf"):
        raise ValueError(f"tau: expected a finite positive number, got {tau}")
    return float(tau), int64_tensor(seed, "seed", logits.device)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x in one of the two layouts of the kernels: contiguous or channels_last."""
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _statistics(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Empty kl [B], codes [B, h, w] and stats [B, 4, h, w] (csrc/gumbel/gumbel.h), as the kernels return them."""
    batch, _, height, width = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    kl, stats = logits.new_empty(batch, dtype=dtype), logits.new_empty(batch, 4, height, width, dtype=dtype)
    return kl, logits.new_empty((batch, height, width), dtype=torch.int64), stats


if kernels_loaded():

    @torch.library.register_fake("dalle_fast::gumbel_softmax")
    def _gumbel_softmax_fake(
        logits: torch.Tensor, tau: float, seed: torch.Tensor, hard: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.empty_like(logits), *_statistics(logits)

    @torch.library.register_fake("dalle_fast::gumbel_softmax_backward")
    def _gumbel_softmax_backward_fake(
        grad_y: torch.Tensor,
        grad_kl: torch.Tensor,
        logits: torch.Tensor,
        stats: torch.Tensor,
        tau: float,
        seed: torch.Tensor,
    ) -> torch.Tensor:
        return torch.empty_like(logits)

    def _setup_softmax(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        logits, ctx.tau, seed, _ = inputs
        _, _, codes, stats = output
        ctx.mark_non_differentiable(codes, stats)
        ctx.save_for_backward(logits, stats, seed)

    def _softmax_backward(
        ctx: Any, grad_y: torch.Tensor, grad_kl: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        logits, stats, seed = ctx.saved_tensors
        grad_logits = torch.ops.dalle_fast.gumbel_softmax_backward(
            _dense(grad_y), grad_kl.contiguous(), logits, stats, ctx.tau, seed
        )
        return grad_logits, None, None, None

    torch.library.register_autograd("dalle_fast::gumbel_softmax", _softmax_backward, setup_context=_setup_softmax)

    @torch.library.register_fake("dalle_fast::gumbel_quantize")
    def _gumbel_quantize_fake(
        logits: torch.Tensor, codebook: torch.Tensor, tau: float, seed: torch.Tensor, hard: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, _, height, width = logits.shape
        channels = codebook.shape[1]
        layout = torch.contiguous_format if logits.is_contiguous() else torch.channels_last
        z = torch.empty(
            (batch, channels, height, width), dtype=logits.dtype, device=logits.device, memory_format=layout
        )
        kl, codes, stats = _statistics(logits)
        return z, kl, codes, stats, kl.new_empty(batch, height * width, channels)

    @torch.library.register_fake("dalle_fast::gumbel_quantize_backward")
    def _gumbel_quantize_backward_fake(
        grad_z: torch.Tensor,
        grad_kl: torch.Tensor,
        logits: torch.Tensor,
        codebook: torch.Tensor,
        codes: torch.Tensor,
        stats: torch.Tensor,
        soft: torch.Tensor,
        tau: float,
        seed: torch.Tensor,
        hard: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(logits), torch.empty_like(codebook)

    def _setup_quantize(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        logits, codebook, ctx.tau, seed, ctx.hard = inputs
        _, _, codes, stats, soft = output
        ctx.mark_non_differentiable(codes, stats, soft)
        ctx.save_for_backward(logits, codebook, codes, stats, soft, seed)

    def _quantize_backward(
        ctx: Any, grad_z: torch.Tensor, grad_kl: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        *saved, seed = ctx.saved_tensors
        grad_logits, grad_codebook = torch.ops.dalle_fast.gumbel_quantize_backward(
            _dense(grad_z), grad_kl.contiguous(), *saved, ctx.tau, seed, ctx.hard
        )
        return grad_logits, grad_codebook, None, None, None

    torch.library.register_autograd("dalle_fast::gumbel_quantize", _quantize_backward, setup_context=_setup_quantize)

    @torch.library.register_fake("dalle_fast::philox_uniform")
    def _philox_uniform_fake(seed: torch.Tensor, first: int, n: int) -> torch.Tensor:
        return seed.new_empty(n, dtype=torch.float32)
