"""Scales of the gradients, so that 16 bits hold them (appendices A.2 and D)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import nn

from ..ops import initial_scales, update_scales
from ..ops.resblock import WINDOW


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
