"""Schedules of training: pure functions of the step, and the one that watches the loss.

``step`` counts finished steps: the first step is made at 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """Half a cosine from ``start`` at step 0 to ``end`` at ``steps``, and ``end`` from there on."""
    if step >= steps:
        return end
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / steps))


def warmup(step: int, steps: int) -> float:
    """A factor that grows linearly to 1 over the first ``steps`` steps and is never 0."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


@dataclass
class Plateau:
    """Halve the step size whenever the training loss stops falling (appendix B.2). Its fields are its state.

    Not torch's ``ReduceLROnPlateau``, which compares single losses and has no limit of halvings.

    The loss is averaged over windows of steps. A window that does not improve on the best one by a share of
    ``min_gain`` is stale, and ``patience`` stale windows in a row are a plateau. The paper gives the number of halvings
    but not the criterion.
    """

    window: int  # steps
    patience: int  # windows
    min_gain: float = 1e-3
    max_halvings: int = 5
    halvings: int = 0
    best: float = math.inf
    stale: int = 0
    total: float = 0.0
    count: int = 0

    @property
    def scale(self) -> float:
        """Factor of the step size."""
        return 0.5**self.halvings

    def update(self, loss: float) -> bool:
        """Add the loss of one step; returns whether it caused a halving."""
        self.total += loss
        self.count += 1
        if self.count < self.window:
            return False
        mean = self.total / self.count
        self.total, self.count = 0.0, 0
        if self.best == math.inf or mean < self.best - self.min_gain * abs(self.best):
            self.best, self.stale = mean, 0
            return False
        self.stale += 1
        if self.stale < self.patience or self.halvings == self.max_halvings:
            return False
        self.halvings, self.stale = self.halvings + 1, 0
        return True
