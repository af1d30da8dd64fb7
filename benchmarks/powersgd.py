"""Training loss and bytes sent with PowerSGD: the tiny transformer on scenes, two nodes of two processes.

Run: python benchmarks/powersgd.py. It takes a quarter of an hour on two cores. Bytes are counted as they are sent.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import dalle_fast as df
from dalle_fast.data.sources.scenes import SceneCorpus
from dalle_fast.demo.run import encode_all
from dalle_fast.distributed.collectives import Nodes, all_reduce
from dalle_fast.distributed.powersgd import resblock_matrices
from dalle_fast.distributed.sharding import local
from dalle_fast.distributed.world import World
from dalle_fast.training import loop
from dalle_fast.training.dalle import DALLETask
from dalle_fast.training.plan import powersgd_saving
from dalle_fast.training.settings import TRAIN_PRESETS
from dalle_fast.training.state import State, new_state

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from helpers.processes import run_processes

SCENES, STEPS, LAST, SEEDS, RANKS = 2_000, 150, 50, (0, 1, 2), (48, 24)
NODES, GPUS = 2, 2
PATIENCE = 3600  # seconds


def train(codes: Any, seed: int, rank: int | None, world: World) -> tuple[float, State]:
    """The mean loss of the last steps, and the state after them."""
    pipe = df.TextToImage.load("tiny")
    short = {"steps": STEPS, "warmup_steps": 20, "batch_size": 8}
    config = replace(TRAIN_PRESETS["tiny"].dalle, **short, seed=seed, powersgd_rank=rank)
    task = DALLETask(codes, None, pipe.tokenizer, pipe.dalle.cfg, config, None, world)
    state, batches, curve = new_state(task.model, config, task.scales, world, task.start), task.batches(0), []
    for state.step in range(STEPS):
        _, metrics = loop.train_step(state, task, next(batches), config.lr_at(state.step), config)
        curve.append(metrics["loss"].item())
    return float(np.mean(curve[-LAST:])), state


def uncompressed(state: State, world: World) -> Sequence[int]:
    """Bytes that a process sends to sum the matrices of resblocks in 16 bits, and everything else in 32."""
    nodes, matrices = Nodes(world.peers), resblock_matrices(state.model)
    shards = {name: local(parameter.detach()) for name, parameter in state.model.named_parameters()}
    all_reduce([shards[name] for name in matrices], nodes, 16)
    sent = nodes.sent
    all_reduce([shard for name, shard in shards.items() if name not in matrices], nodes, 32)
    return sent, nodes.sent - sent


def compare(world: World, codes: Any) -> None:
    """Train without PowerSGD and at each rank; the first process prints."""
    show = print if world.is_first else lambda *_, **__: None
    show(f"mean loss of the last {LAST} of {STEPS} steps, nats; bytes that a process sends for the matrices per step")
    show(
        f"{'rank':>6}",
        *(f"{f'seed {seed}':>8}" for seed in SEEDS),
        f"{'mean':>8} {'bytes':>9} {'share':>6} predicted",
    )
    for low_rank in (None, *RANKS):
        runs = [train(codes, seed, low_rank, world) for seed in SEEDS]
        losses, state = [loss for loss, _ in runs], runs[0][1]
        whole, rest = uncompressed(state, world)
        sent, predicted = whole, 1.0
        if low_rank and state.powersgd:
            sent = state.powersgd.sent / STEPS - rest
            predicted = 1 - powersgd_saving(state.model.cfg.d_model, low_rank, GPUS)
        columns = [f"{loss:>8.4f}" for loss in (*losses, np.mean(losses))]
        show(
            f"{low_rank or 'whole':>6}",
            *columns,
            f"{sent:>9.0f} {sent / whole:>6.3f} {predicted:>9.3f}",
            flush=True,
        )
    show(f"everything else: {rest} bytes")


def main() -> None:
    codes = encode_all(df.TextToImage.load("tiny").dvae, list(SceneCorpus(SCENES)))
    run_processes(partial(compare, codes=codes), NODES, GPUS, patience=PATIENCE)


if __name__ == "__main__":
    main()
