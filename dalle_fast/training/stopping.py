"""How a training can end before its time."""

from __future__ import annotations

import signal


class TrainingStopped(Exception):
    """Ctrl-C or a request to end: the run has saved its state and goes on from there next time."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}, saved after update {step}")
        self.signum = signum
        self.step = step


class TrainingDiverged(Exception):
    """Many updates in a row had no finite gradient: the parameters will not recover."""
