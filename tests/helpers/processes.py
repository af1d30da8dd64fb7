"""Runs a function in several processes, started as torchrun starts them; also used by benchmarks."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed import TCPStore

from dalle_fast.distributed.world import World, join_world

PRELOADED = ["torch._dynamo", "torch.distributed.fsdp", "dalle_fast.training.dalle"]  # once for all processes
PATIENCE = 300  # seconds


def run_processes(
    work: Callable[[World], Any], nodes: int = 1, per_node: int = 1, parallel: str = "fsdp", patience: float = PATIENCE
) -> list[Any]:
    """Run ``work`` in ``nodes * per_node`` processes on the CPU, each with one thread; returns its results by rank.

    Args:
        work: a function of a module, or a ``partial`` of one. It gets the world that its process has joined.
        parallel: as in ``join_world``.
        patience: seconds, after which the processes are ended.

    Raises:
        ProcessRaisedException: a process failed; with its traceback.
        TimeoutError: the processes took too long.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": nodes * per_node,
        "LOCAL_WORLD_SIZE": per_node,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": store.port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # the store is in this process
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = (work, environment, parallel, Path(folder))
        processes = mp.start_processes(_process, arguments, nodes * per_node, join=False, start_method="forkserver")
        deadline = time.monotonic() + patience
        while not processes.join(max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                for process in processes.processes:
                    process.kill()
                raise TimeoutError(f"processes: expected them to end within {patience} s")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(nodes * per_node)]


def _process(rank: int, work: Callable[[World], Any], environment: dict[str, Any], parallel: Any, folder: Path) -> None:
    torch.set_num_threads(1)
    local_rank = rank % environment["LOCAL_WORLD_SIZE"]
    os.environ |= {name: str(value) for name, value in {**environment, "RANK": rank, "LOCAL_RANK": local_rank}.items()}
    with join_world("cpu", parallel) as world:
        torch.save(work(world), folder / f"{rank}.pt")
