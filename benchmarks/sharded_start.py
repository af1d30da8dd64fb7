"""Peak memory of each of four processes of one node at the start of a training of 350 million parameters.

Run: python benchmarks/sharded_start.py. It takes about a minute on two cores.
"""

from __future__ import annotations

import resource
import sys
import time
from functools import partial
from pathlib import Path

from dalle_fast.config import DALLEConfig
from dalle_fast.distributed.start import new_model
from dalle_fast.distributed.world import World
from dalle_fast.models import DALLE
from dalle_fast.training.settings import TrainDALLE
from dalle_fast.training.state import new_state

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from helpers.processes import run_processes

PROCESSES = 4
SIZES = DALLEConfig(d_model=1024, n_layer=24)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def start_training(world: World) -> None:
    """Start a training; the first process prints what all took."""
    before, begin = peak_mb(), time.perf_counter()
    model, start = new_model(partial(DALLE, SIZES), 0, world)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    new_state(model, TrainDALLE(), None, world, start)
    more, seconds = peak_mb() - before, time.perf_counter() - begin
    lines = world.gather(f"process {world.rank}: {more:.0f} MB more than the {before:.0f} before, {seconds:.1f} s")
    if world.is_first:
        print(f"{parameters / 1e6:.0f} million parameters and their averages: {parameters * 8 / 1e6:.0f} MB in all")
        print(*lines, sep="\n")


def main() -> None:
    run_processes(start_training, per_node=PROCESSES)


if __name__ == "__main__":
    main()
