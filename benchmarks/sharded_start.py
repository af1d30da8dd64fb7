"""The most memory that each of four processes of one machine takes to start a training of 340 million parameters.

Run: python benchmarks/sharded_start.py. It takes about a minute on two cores.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from functools import partial

import torch
import torch.multiprocessing as mp

from dalle_fast.config import DALLEConfig
from dalle_fast.distributed.start import new_model
from dalle_fast.distributed.world import join_world
from dalle_fast.models import DALLE
from dalle_fast.training.settings import TrainDALLE
from dalle_fast.training.state import new_state

PROCESSES = 4
SIZES = DALLEConfig(d_model=1024, n_layer=24)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def process(rank: int, port: int) -> None:
    """One of the processes, as torchrun would start it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with join_world("cpu") as world:
        before, begin = peak_mb(), time.perf_counter()
        model, start = new_model(partial(DALLE, SIZES), 0, world)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        new_state(model, TrainDALLE(), None, world, start)
        more, seconds = peak_mb() - before, time.perf_counter() - begin
        lines = world.gather(f"process {rank}: {more:.0f} MB more than the {before:.0f} before, {seconds:.1f} s")
        if world.is_first:
            print(f"{parameters / 1e6:.0f} million parameters and their averages: {parameters * 8 / 1e6:.0f} MB in all")
            print(*lines, sep="\n")


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    mp.start_processes(process, (port,), PROCESSES, start_method="spawn")


if __name__ == "__main__":
    main()
