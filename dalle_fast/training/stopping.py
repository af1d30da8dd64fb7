"""Early ends of a run: the signals that stop it, and the exceptions it raises."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TrainingStopped(Exception):
    """SIGINT, SIGTERM or SIGHUP: the run has saved its state and goes on from there next time."""

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}, saved after step {step}")
        self.signum = signum
        self.step = step


class TrainingDiverged(Exception):
    """Too many steps in a row, or the last ones, had no finite gradient; or the trained model is not finite."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP instead of dying from them; a second signal has its usual effect.

    SIGHUP, of a terminal that is closed, stays ignored under ``nohup``.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield received
        return
    earlier = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if earlier[signal.SIGHUP] == signal.SIG_IGN:
        del earlier[signal.SIGHUP]

    def restore() -> None:
        for signum, handler in earlier.items():
            signal.signal(signum, handler)

    def receive(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        restore()

    for signum in earlier:
        signal.signal(signum, receive)
    try:
        yield received
    finally:
        restore()
