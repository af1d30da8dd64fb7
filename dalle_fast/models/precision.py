"""Mixed precision: which numbers of a training have 16 bits, in one place (section 2.4, appendices A and D).

The transformer:

float32: the residual stream and its gradient, LayerNorms, embeddings, unembeddings and logits; all gains and biases;
    the gradients and moments of all these.
16 bits: the inside of a resblock, which is the attention or the MLP of a layer: activations, their gradients, and the
    gradients of its matrices. The matrices are stored in float32, so that small updates are not lost, and rounded
    whenever the resblock runs.

Gradients are scaled per resblock, because one scale cannot fit all depths into float16.

The dVAE:

float32: the encoder's last convolution and the logits, the relaxed sample and the codebook, the KL, the likelihood.
16 bits: all other convolutions and the activations between them; their filters are stored in float32 as well.

All its gradients have one scale, that of the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..ops import residual_layer_norm

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def dtype_of(setting: Literal["auto", "float16", "bfloat16", "float32"], device: torch.device | str) -> torch.dtype:
    """The dtype of a setting: "auto" is float16 on CUDA, as in the paper, and float32 elsewhere.

    On a CPU 16 bits save nothing; they serve to see their effect on a training.
    """
    if setting == "auto":
        return torch.float16 if torch.device(device).type == "cuda" else torch.float32
    return DTYPES[setting]


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Inside, new tensors are float32, whatever the default of the program is; also a decorator."""
    default = torch.get_default_dtype()
    if default == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class ResblockScales(Protocol):
    """Gradient scales, one per resblock, such as ``training.scales.GradientScales``; tensors [n_resblocks]."""

    scale: torch.Tensor
    nonfinite: torch.Tensor


@dataclass(frozen=True)
class Precision:
    """How a transformer computes its resblocks.

    Args:
        dtype: dtype inside them; None is that of the residual stream.
        recompute: keep only the stream in front of each resblock, and run it again in the backward.
        scales: scales of the gradients inside; None leaves them as they are.
    """

    dtype: torch.dtype | None = None
    recompute: bool = False
    scales: ResblockScales | None = None

    def run(self, resblock: nn.Module, norm: nn.LayerNorm, stream: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """Output of a resblock on its input ``normed``, which is the normalised stream."""
        if not (self.recompute and torch.is_grad_enabled()):
            return resblock(normed)
        dtype, trains, at_first = normed.dtype, normed.requires_grad, [normed]

        def run_or_rerun(stream: torch.Tensor) -> torch.Tensor:
            if at_first:
                return resblock(at_first.pop())  # popped, so that its memory is freed
            with torch.no_grad():
                _, again = residual_layer_norm(stream, None, norm.weight, norm.bias, norm.eps, dtype)
            return resblock(again.requires_grad_(trains))

        return checkpoint(run_or_rerun, stream, use_reentrant=False, preserve_rng_state=False)  # nothing is random

    def between(self, i: int, n: int) -> Between:
        """Arguments of ``residual_layer_norm`` where resblock i - 1 of n ends and resblock i starts; 0 <= i <= n."""
        dtype = self.dtype if i < n else None  # the logits have that of the stream
        if self.scales is None:
            return Between(dtype)
        scale, nonfinite = self.scales.scale, self.scales.nonfinite
        return Between(
            dtype,
            scale_in=scale[i] if i < n else None,
            scale_out=scale[i - 1] if i > 0 else None,
            nonfinite=nonfinite[i] if i < n else None,
        )


class Between(NamedTuple):
    """The last arguments of ``residual_layer_norm``."""

    dtype: torch.dtype | None = None
    scale_in: torch.Tensor | None = None
    scale_out: torch.Tensor | None = None
    nonfinite: torch.Tensor | None = None


# ---------------------------------------------------------------------------------------------- layers


def rounded_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``F.linear`` of 16-bit activations with float32 parameters, in the dtype of x.

    The weight, and on CUDA the bias, is rounded to the dtype of x, and so are the gradients of x and of the weight;
    that of the bias stays in float32. On a CPU the rounded matrices are multiplied in float32: without instructions
    for 16 bits, which many CPUs lack, torch takes about ten times as long.
    """
    return _RoundedLinear.apply(x, weight, bias)


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)  # not the rounded weight: it would be kept for all resblocks at once
        rounded = weight.to(x.dtype)
        if x.device.type == "cpu":
            return F.linear(x.float(), rounded.float(), bias).to(x.dtype)
        return F.linear(x, rounded, bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        dtype, rounded = x.dtype, weight.to(x.dtype)
        if x.device.type == "cpu":
            grad, x, rounded = grad.float(), x.float(), rounded.float()
        rows = grad.flatten(0, -2)
        grad_weight = rows.t() @ x.flatten(0, -2)
        return (grad @ rounded).to(dtype), grad_weight.to(dtype).float(), rows.sum(0, dtype=torch.float32)


def rounded_conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding: int) -> torch.Tensor:
    """``F.conv2d`` of 16-bit maps [B, n_in, h, w] with float32 parameters; rounded as in ``rounded_linear``."""
    return _RoundedConv2d.apply(x, weight, bias, padding)


class _RoundedConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        rounded = weight.to(x.dtype)
        if x.device.type == "cpu":
            return F.conv2d(x.float(), rounded.float(), bias, padding=padding).to(x.dtype)
        return F.conv2d(x, rounded, bias.to(x.dtype), padding=padding)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        dtype, rounded = x.dtype, weight.to(x.dtype)
        grad_bias = grad.sum((0, 2, 3), dtype=torch.float32)
        if x.device.type == "cpu":
            grad, x, rounded = grad.float(), x.float(), rounded.float()
        wanted = [ctx.needs_input_grad[0], True, False]  # not of the bias; the image is not differentiated
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, rounded, None, [1, 1], [ctx.padding] * 2, [1, 1], False, [0, 0], 1, wanted
        )
        return None if grad_x is None else grad_x.to(dtype), grad_weight.to(dtype).float(), grad_bias, None
