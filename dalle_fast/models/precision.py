"""Which numbers of a training have 16 bits: the policy in one place (section 2.4, appendices A and D).

The transformer:

float32: the residual stream and its gradient, LayerNorms, embeddings, unembeddings and logits; all gains and biases;
    the gradients and moments of all these.
16 bits: what happens inside a resblock, which is the attention or the MLP of a layer: activations, their gradients, and
    those of its matrices. The matrices are stored in float32, so that small updates are not lost, and rounded whenever
    the resblock runs.

Gradients inside a resblock are times a scale of its own, for the range of float16 is too small for all depths at once.

The dVAE:

float32: the encoder's last convolution and the logits, the relaxed sample and the codebook, the KL, the likelihood.
16 bits: all other convolutions and what is between them; their filters are stored in float32 as well.

All its gradients are times one scale: that of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..ops import initial_scales, residual_layer_norm, update_scales
from ..ops.resblock import WINDOW

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def dtype_of(setting: Literal["auto", "float16", "bfloat16", "float32"], device: torch.device | str) -> torch.dtype:
    """The dtype that a setting means: "auto" is float16 on CUDA, as in the paper, and float32 elsewhere.

    On a CPU 16 bits save nothing: they are there to see what they do to a training.
    """
    if setting == "auto":
        return torch.float16 if torch.device(device).type == "cuda" else torch.float32
    return DTYPES[setting]


@dataclass(frozen=True)
class Precision:
    """How a transformer computes its resblocks.

    Args:
        dtype: of what happens inside; None is that of the residual stream.
        recompute: keep nothing of them for the backward but the stream in front of each, and run them once more then.
        scales: of the gradients inside; None leaves them as they are.
    """

    dtype: torch.dtype | None = None
    recompute: bool = False
    scales: GradientScales | None = None

    def run(self, resblock: nn.Module, norm: nn.LayerNorm, stream: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        """What a resblock makes of its input ``normed``, which is the normalised stream."""
        if not (self.recompute and torch.is_grad_enabled()):
            return resblock(normed)
        dtype, trains, at_first = normed.dtype, normed.requires_grad, [normed]

        def run_or_rerun(stream: torch.Tensor) -> torch.Tensor:
            if at_first:
                return resblock(at_first.pop())  # and nobody keeps it
            with torch.no_grad():
                _, again = residual_layer_norm(stream, None, norm.weight, norm.bias, norm.eps, dtype)
            return resblock(again.requires_grad_(trains))

        return checkpoint(run_or_rerun, stream, use_reentrant=False, preserve_rng_state=False)  # nothing is random

    def between(self, i: int, n: int) -> Between:
        """What ``residual_layer_norm`` must know where resblock i - 1 of n ends and resblock i starts; 0 <= i <= n."""
        dtype = self.dtype if i < n else None  # the logits are computed in that of the stream
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


# ---------------------------------------------------------------------------------------------- gradient scales


class Scales(Protocol):
    """What gradients are multiplied by while a model trains, so that 16 bits hold them, and which updates are left out.

    The state is on the device. An update::

        loss.backward()
        factors = scales.factors()
        norm, nonfinite = gradient_norm(gradients, factors)
        optimizer.step(unscale=factors, clip=limit / norm, skip=scales.skip(nonfinite))
        scales.update()

    Attributes:
        nonfinite: what is to blame in the update at hand, 0 where nothing is. Processes that train together must agree
            on it before they call ``skip``.
    """

    nonfinite: torch.Tensor

    def watch(self, parameters: Sequence[torch.Tensor]) -> None:
        """Say which parameters ``factors`` and ``skip`` speak of, in their order."""

    def factors(self) -> torch.Tensor:
        """What makes the gradients of the parameters true to size, [n_parameters]."""

    def skip(self, nonfinite: torch.Tensor) -> torch.Tensor:
        """Which parameters to leave out of the update, [n_parameters] bool, and note what is to blame.

        nonfinite: [n_parameters] bool, whose gradients are not finite.
        """

    def update(self) -> None:
        """Let scales grow, or shrink where gradients were not finite; for every update, also one that was skipped."""

    @property
    def patience(self) -> int:
        """Updates in which any scale comes down to the least; no more of them in a row will end overflows."""

    def record(self) -> dict[str, Any]:
        """For the log."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state between updates; a checkpoint is read into these."""


class GradientScales:
    """``Scales`` with one for every resblock (appendix D).

    The state are tensors [n_resblocks]: ``scale``, ``since_division`` and ``nonfinite``, explained in
    ``ops/resblock.py``, and ``overflows``. The backward sets ``nonfinite`` of resblocks whose activations had gradients
    that overflowed.

    Args:
        resblocks: the parts of the model with a scale each.
        replicas: how many data-parallel replicas there are, M in the paper; each divides its loss by all samples.
        skipping: what a gradient that is not finite in one resblock leaves out: the whole "update", as in the paper, or
            that "resblock" alone. Outside of the resblocks it always leaves out all.
        device: of the state.

    Raises:
        ValueError: no resblocks, or replicas less than 1.
    """

    def __init__(
        self,
        resblocks: Sequence[nn.Module],
        replicas: int = 1,
        skipping: Literal["update", "resblock"] = "update",
        device: torch.device | str | None = None,
    ) -> None:
        self.replicas, self.skipping = replicas, skipping
        self.scale, self.since_division, self.nonfinite = initial_scales(len(resblocks), replicas, device)
        self.overflows = torch.zeros_like(self.nonfinite)  # updates in which a resblock was to blame
        self._resblocks = resblocks
        self._homes = self.scale.new_empty(0, dtype=torch.int64)  # resblock of each parameter; n for those of none

    def watch(self, parameters: Sequence[torch.Tensor]) -> None:
        homes = {id(parameter): i for i, resblock in enumerate(self._resblocks) for parameter in resblock.parameters()}
        self._homes = self._homes.new_tensor([homes.get(id(parameter), len(self.scale)) for parameter in parameters])

    def factors(self) -> torch.Tensor:
        """1 / scale inside of resblocks, 1 elsewhere."""
        return torch.cat([1 / self.scale, self.scale.new_ones(1)])[self._homes]

    def skip(self, nonfinite: torch.Tensor) -> torch.Tensor:
        n = len(self.scale)
        found = torch.zeros(n + 1, dtype=torch.int32, device=self.scale.device)
        found.index_add_(0, self._homes, nonfinite.int())
        self.nonfinite.logical_or_(found[:n])
        if self.skipping == "update":
            return (self.nonfinite.any() | (found[n] > 0)).expand_as(nonfinite)
        return torch.cat([self.nonfinite, found[n:]]).bool()[self._homes] | (found[n] > 0)

    @property
    def patience(self) -> int:
        return 2 * (24 - 7) * WINDOW  # divisions by sqrt(2), from the largest

    def update(self) -> None:
        self.overflows += self.nonfinite
        update_scales(self.scale, self.since_division, self.nonfinite, self.replicas)

    def record(self) -> dict[str, list[float]]:
        """By resblock: the scales as powers of 2, and how many updates have overflowed, if any."""
        scales = {"log2_scales": [round(math.log2(scale), 3) for scale in self.scale.tolist()]}
        overflows = self.overflows.tolist()
        return scales | ({"overflows": overflows} if any(overflows) else {})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state between updates, when ``nonfinite`` is 0."""
        return {"scale": self.scale, "since_division": self.since_division, "overflows": self.overflows}


class LossScale:
    """``Scales`` with one for the whole model: that of the loss (appendix A.2), ruled as by ``torch.amp.GradScaler``.

    A gradient that is not finite halves the scale and leaves out the update; 2000 updates without one double it.

    The state are tensors [1]: ``scale``, ``finite_updates``, made since it last changed, and ``overflows``.

    Args:
        device: of the state.
    """

    FIRST, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000
    LARGEST = 2.0**100  # gradients of 16 bits have overflowed long before, unless all are 0

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.scale = torch.full((1,), self.FIRST, device=device)
        self.finite_updates = torch.zeros(1, dtype=torch.int32, device=device)
        self.overflows = torch.zeros_like(self.finite_updates)
        self.nonfinite = torch.zeros(1, dtype=torch.bool, device=device)  # in the update at hand
        self._n_parameters = 0

    def multiply(self, loss: torch.Tensor) -> torch.Tensor:
        """The same loss, whose gradients will be times the scale."""
        loss.register_hook(lambda grad: grad * self.scale.reshape(()))
        return loss

    def watch(self, parameters: Sequence[torch.Tensor]) -> None:
        self._n_parameters = len(parameters)

    def factors(self) -> torch.Tensor:
        return (1 / self.scale).repeat(self._n_parameters)

    def skip(self, nonfinite: torch.Tensor) -> torch.Tensor:
        self.nonfinite |= nonfinite.any()
        return self.nonfinite.expand_as(nonfinite)

    @property
    def patience(self) -> int:
        return 40  # halvings through the range of float16, from 2^16 to 2^-24

    def update(self) -> None:
        self.overflows += self.nonfinite
        self.finite_updates.add_(1).masked_fill_(self.nonfinite, 0)
        grows = self.finite_updates == self.GROWTH_INTERVAL
        self.finite_updates.masked_fill_(grows, 0)
        self.scale *= torch.where(self.nonfinite, self.BACKOFF, torch.where(grows, self.GROWTH, 1.0))
        self.scale.clamp_(max=self.LARGEST)
        self.nonfinite.zero_()

    def record(self) -> dict[str, Any]:
        """The scale as a power of 2, and how many updates have overflowed, if any."""
        overflows = int(self.overflows)
        return {"log2_scale": math.log2(self.scale.item())} | ({"overflows": overflows} if overflows else {})

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"scale": self.scale, "finite_updates": self.finite_updates, "overflows": self.overflows}


# ---------------------------------------------------------------------------------------------- layers


def rounded_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``F.linear`` of 16-bit activations with float32 parameters, in the dtype of x.

    The weight, and on CUDA the bias, is rounded to the dtype of x, and so are the gradients of x and of the weight;
    that of the bias stays in float32. On a CPU the rounded matrices are multiplied in float32: without instructions
    for 16 bits, which many have not, torch takes about ten times as long for them.
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
