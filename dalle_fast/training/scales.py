"""Scale factors of gradients in 16 bits: one per resblock, or one for the loss (appendices A.2 and D)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import nn

from ..ops import initial_scales, update_scales
from ..ops.resblock import WINDOW


class Scales(Protocol):
    """Scale factors that keep the gradients of a model within 16 bits, and the choice of steps to skip.

    The state is on the device. A step::

        loss.backward()
        factors = scales.factors()
        norm, nonfinite = gradient_norm(gradients, factors)
        optimizer.step(unscale=factors, clip=limit / norm, skip=scales.skip(nonfinite))
        scales.update()

    Attributes:
        nonfinite: per scale, whether gradients were not finite in the current step; 0 where they were. Processes that
            train together must agree on it before they call ``skip``.
    """

    nonfinite: torch.Tensor

    def watch(self, parameters: Sequence[torch.Tensor]) -> None:
        """Set the parameters that ``factors`` and ``skip`` refer to, in their order."""

    def factors(self) -> torch.Tensor:
        """Factors that undo the scales in the gradients of the parameters, [n_parameters]."""

    def skip(self, nonfinite: torch.Tensor) -> torch.Tensor:
        """Parameters to leave out of the step, [n_parameters] bool; also sets ``self.nonfinite``.

        Args:
            nonfinite: [n_parameters] bool, True for gradients that are not finite.
        """

    def update(self) -> None:
        """Let scales grow, or shrink where gradients were not finite; after every step, also a skipped one."""

    @property
    def patience(self) -> int:
        """Steps within which any scale falls to its minimum: more overflows in a row than that will not end."""

    def record(self) -> dict[str, Any]:
        """Values for the log."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state between steps; a checkpoint is read into these."""


class GradientScales:
    """``Scales`` with one per resblock (appendix D).

    The state consists of tensors [n_resblocks]: ``scale``, ``since_division`` and ``nonfinite``, explained in
    ``ops/resblock.py``, and ``overflows``. The backward sets ``nonfinite`` of the resblocks in which gradients of
    activations overflowed.

    Args:
        resblocks: the modules with a scale each.
        replicas: number of data-parallel replicas, M in the paper; each divides its loss by all samples.
        skipping: what is skipped when a gradient in one resblock is not finite: the whole "step", as in the paper, or
            that "resblock" alone. One outside of the resblocks always skips the whole step.
        device: of the state.

    Raises:
        ValueError: no resblocks, or replicas less than 1.
    """

    def __init__(
        self,
        resblocks: Sequence[nn.Module],
        replicas: int = 1,
        skipping: Literal["step", "resblock"] = "step",
        device: torch.device | str | None = None,
    ) -> None:
        self.replicas, self.skipping = replicas, skipping
        self.scale, self.since_division, self.nonfinite = initial_scales(len(resblocks), replicas, device)
        self.overflows = torch.zeros_like(self.nonfinite)  # steps in which a resblock's gradients were not finite
        self._resblocks = resblocks
        self._homes = self.scale.new_empty(0, dtype=torch.int64)  # resblock of each parameter; n outside

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
        if self.skipping == "step":
            return (self.nonfinite.any() | (found[n] > 0)).expand_as(nonfinite)
        return torch.cat([self.nonfinite, found[n:]]).bool()[self._homes] | (found[n] > 0)

    @property
    def patience(self) -> int:
        return 2 * (24 - 7) * WINDOW  # divisions by sqrt(2), from the largest

    def update(self) -> None:
        self.overflows += self.nonfinite
        update_scales(self.scale, self.since_division, self.nonfinite, self.replicas)

    def record(self) -> dict[str, list[float]]:
        """Per resblock: log2 of the scale, and the number of overflows unless all are 0."""
        scales = {"log2_scales": [round(math.log2(scale), 3) for scale in self.scale.tolist()]}
        overflows = self.overflows.tolist()
        return scales | ({"overflows": overflows} if any(overflows) else {})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state between steps, when ``nonfinite`` is 0."""
        return {"scale": self.scale, "since_division": self.since_division, "overflows": self.overflows}


class LossScale:
    """``Scales`` with a single one, of the loss (appendix A.2), by the rule of ``torch.amp.GradScaler``.

    Not that class itself: its ``step`` reads on the host whether gradients are finite, a second wait for the device.

    A gradient that is not finite halves the scale and skips the step; 2000 finite steps in a row double it.

    The state consists of tensors [1]: ``scale``, ``finite_steps`` since it last changed, and ``overflows``.

    Args:
        device: of the state.
    """

    FIRST, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000
    LARGEST = 2.0**100  # gradients in 16 bits overflow long before, unless all are 0

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.scale = torch.full((1,), self.FIRST, device=device)
        self.finite_steps = torch.zeros(1, dtype=torch.int32, device=device)
        self.overflows = torch.zeros_like(self.finite_steps)
        self.nonfinite = torch.zeros(1, dtype=torch.bool, device=device)  # in the current step
        self._n_parameters = 0

    def multiply(self, loss: torch.Tensor) -> torch.Tensor:
        """The same loss, whose gradients will be multiplied by the scale."""
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
        self.finite_steps.add_(1).masked_fill_(self.nonfinite, 0)
        grows = self.finite_steps == self.GROWTH_INTERVAL
        self.finite_steps.masked_fill_(grows, 0)
        self.scale *= torch.where(self.nonfinite, self.BACKOFF, torch.where(grows, self.GROWTH, 1.0))
        self.scale.clamp_(max=self.LARGEST)
        self.nonfinite.zero_()

    def record(self) -> dict[str, Any]:
        """log2 of the scale, and the number of overflows unless it is 0."""
        overflows = int(self.overflows)
        return {"log2_scale": math.log2(self.scale.item())} | ({"overflows": overflows} if overflows else {})

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"scale": self.scale, "finite_updates": self.finite_steps, "overflows": self.overflows}
