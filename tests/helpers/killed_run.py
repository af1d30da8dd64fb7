"""A toy training that is killed and resumed again and again, as a program: it forks, which needs a process of its own.

    python killed_run.py FOLDER KILLS

prints JSON: ``steps`` in the end, and of every kill the steps in the log and in the newest checkpoint, and whether it
left one half written. FOLDER/killed is the killed run, FOLDER/whole the same run undisturbed.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dalle_fast import models
from dalle_fast.models.base import TrainableModel
from dalle_fast.training import TrainDALLE, fit

SAVE_EVERY = 3


@dataclass(frozen=True)
class ToyConfig:
    width: int = 4


class Toy(TrainableModel):
    def __init__(self, cfg: ToyConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.layer = nn.Linear(cfg.width, cfg.width)

    def resblocks(self) -> list[tuple[str, nn.Module]]:
        return []


models.KINDS["toy"] = (Toy, ToyConfig)


class ToyTask:
    """Noise from every global generator, and batches that depend on the step: a resumed run must restore both."""

    kind, corpus, start, scales = "toy", "noise", None, None

    def __init__(self) -> None:
        self.model = Toy(ToyConfig())
        nn.init.eye_(self.model.layer.weight)
        nn.init.zeros_(self.model.layer.bias)

    def batches(self, start: int) -> Iterator[dict]:
        while True:
            yield {"x": torch.full((2, 4), float(start % 7))}
            start += 1

    def loss(self, model: nn.Module, batch: dict, step: int) -> tuple[torch.Tensor, dict]:
        noise = torch.rand(2, 4) + random.random() + np.random.rand()  # noqa: NPY002
        return (model.layer(batch["x"]) - noise).square().mean(), {}

    def validation(self) -> list:
        return []

    def continue_report(self, path: Path) -> None:
        pass

    def report_skipped(self, path: Path) -> None:
        path.write_text("")


def train(out: Path, steps: int) -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    config = TrainDALLE(
        steps=steps, batch_size=2, lr=1e-2, warmup_steps=2, plateau_window=2, plateau_patience=1, ema_every=2,
        log_every=1, save_every=SAVE_EVERY,
    )  # fmt: skip
    fit(ToyTask(), config, out)


def fork(work: Callable[[], None]) -> int:
    """Do the work in another process; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def finish(work: Callable[[], None]) -> float:
    """Do the work in another process to its end; the seconds that it took."""
    start = time.perf_counter()
    _, status = os.waitpid(fork(work), 0)
    if status:
        sys.exit("a run failed, see above")
    return time.perf_counter() - start


def newest(out: Path) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    return max((int(path.name[5:]) for path in (out / "toy" / "checkpoints").glob("step-*[0-9]")), default=0)


def logged(out: Path) -> int:
    """The last step in the log, whose last line may be torn."""
    log = out / "toy" / "log.jsonl"
    lines = log.read_text().rpartition("\n")[0].splitlines() if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    moments = random.Random(0)
    killed, whole = folder / "killed", folder / "whole"
    train(folder / "warm", 1)  # imports what is imported at the first use; its only other thread has ended
    a_while = finish(lambda: train(folder / "timed", 4 * SAVE_EVERY))
    seen = []
    for _ in range(kills):
        pid = fork(lambda: train(killed, 10**9))
        time.sleep(moments.uniform(0, 1.5 * a_while))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if status != signal.SIGKILL:
            sys.exit("a run ended before it was killed, see above")
        torn = bool(list((killed / "toy" / "checkpoints").glob("*.tmp")))
        seen.append({"logged": logged(killed), "saved": newest(killed), "torn": torn})
    steps = newest(killed) + 5
    finish(lambda: train(killed, steps))
    finish(lambda: train(whole, steps))
    print(json.dumps({"steps": steps, "kills": seen}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
