"""Trainings by several processes: see test_distributed.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from helpers.processes import run_processes
from helpers.training import CLIP, DALLE, Memory, settings, task

from dalle_fast.distributed.sharding import local, shard_model, shard_of
from dalle_fast.distributed.start import new_model
from dalle_fast.distributed.world import World
from dalle_fast.models import KINDS
from dalle_fast.training import TrainingStopped, loop
from dalle_fast.training.checkpoint import CheckpointWriter, newest_checkpoint
from dalle_fast.training.loop import fingerprint_of, fit
from dalle_fast.training.state import new_state

Works = dict[str, Callable[[World], Any]]
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "2x2": {"nodes": 2, "per_node": 2},
    "1x4": {"per_node": 4},
    "4x1": {"nodes": 4},
    "ddp": {"nodes": 2, "per_node": 2, "parallel": "ddp"},
}
HALF = {"resblock_dtype": "float16"}
COMPRESSED = HALF | {"recompute": False, "powersgd_rank": 32}  # full rank: 16 for each of two shards


def configured(kind: str, **changes):
    return settings(kind, **{"batch_size": 8, "steps": 3, "log_every": 1, **changes})


def train(world: World, kind: str, out: Path, changes: dict, spoil: Callable | None = None) -> dict:
    """A training in which everything happens within a few steps; returns what this process has seen of it."""
    config = configured(kind, **changes)
    some = task(kind, config, world)
    if spoil:
        some.loss = spoil(some.loss, world)
    said: dict[str, Any] = {"scales": []}
    train_step = loop.train_step

    def watched(state, *rest):
        result = train_step(state, *rest)
        said["parameters"] = sum(local(p).numel() for p in state.parameters)
        said["scales"] += [state.scales.scale.tolist()] if state.scales else []
        return result

    try:
        with patch.object(loop, "train_step", watched):
            model, metrics = fit(some, config, out, world=world)
    except TrainingStopped as stopped:
        return said | {"stopped": [stopped.signum, stopped.step]}
    device = next(model.parameters()).device.type
    return said | {"val_loss": metrics["val_loss"], "device": device}


def resave(world: World, kind: str, source: Path, target: Path, changes: dict) -> None:
    """Load the newest checkpoint of a training and write it again."""
    config = configured(kind, **changes)
    some = task(kind, config, world)
    fingerprint = fingerprint_of(some, config)
    state = new_state(some.model, config, some.scales, world)
    state.load(*newest_checkpoint(source / kind / "checkpoints", fingerprint))
    with CheckpointWriter(target / kind / "checkpoints", 1, world) as writer:
        writer.save(state.step, state.tensors(), {"fingerprint": fingerprint, **state.values()})


def starts(world: World) -> list[dict]:
    """Models that are written shard by shard: whether they are as one process makes them, and the memory, in bytes."""
    said = []
    for kind, cfg in (("dalle", replace(DALLE, n_layer=8)), ("clip", CLIP)):
        build = partial(KINDS[kind][0], cfg)
        with Memory("cpu") as memory:
            model, start = new_model(build, 7, world)
            shard_model(model, world, powersgd=True)
            start.write(model, world)
        whole = dict(new_model(build, 7)[0].named_parameters())
        shards = dict(model.named_parameters())
        same = [torch.equal(local(shard), shard_of(whole[name], shard, world)) for name, shard in shards.items()]
        sizes = [parameter.nbytes for parameter in whole.values()]
        held = sum(local(shard).nbytes for shard in shards.values())
        said.append({"same": all(same), "peak": memory.peak, "held": held, "largest": max(sizes), "whole": sum(sizes)})
    return said


def overflow_in_last(loss, world: World):
    """In the second step the gradients of the last process are not finite."""

    def spoilt(model, batch, step):
        value, metrics = loss(model, batch, step)
        return value * (float("inf") if step == 1 and world.rank == world.size - 1 else 1.0), metrics

    return spoilt


def signal_to_last(loss, world: World):
    """In the second step the last process is asked to stop."""

    def spoilt(model, batch, step):
        if step == 1 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(model, batch, step)

    return spoilt


def each(world: World, works: Works) -> dict[str, Any]:
    return {name: work(world) for name, work in works.items()}


def run_all(out: Path) -> dict[str, list[Any]]:
    """Results of all trainings by name and layout, by rank. Each training has a subfolder of ``out``."""
    said: dict[str, list[Any]] = {}

    def run(layout: str, works: Works) -> None:
        results = run_processes(partial(each, works=works), **LAYOUTS[layout])
        said.update({f"{name} {layout}": [result[name] for result in results] for name in works})

    def training(name: str, layout: str, kind: str, changes: dict, spoil: Callable | None = None) -> Works:
        return {name: partial(train, kind=kind, out=out / f"{name} {layout}", changes=changes, spoil=spoil)}

    def resaved(name: str, layout: str, source: str, changes: dict) -> Works:
        folders = {"source": out / source, "target": out / f"{name} {layout}"}
        return {name: partial(resave, kind="dalle", changes=changes, **folders)}

    def both(layout: str) -> Works:
        """The trainings in which one process and many must agree."""
        return (
            training("float32", layout, "dalle", {"recompute": True})
            | training("float16", layout, "dalle", HALF, overflow_in_last)
            | training("clip", layout, "clip", {"val_samples": 6})
        )

    many = both("2x2") | training("powersgd", "2x2", "dalle", COMPRESSED, overflow_in_last)
    many |= training("dvae", "2x2", "dvae", {"conv_dtype": "float16"})
    run("2x2", many | training("stopped", "2x2", "dalle", {}, signal_to_last))
    run("ddp", training("float32", "ddp", "dalle", {"recompute": False}))
    run("one", both("one") | resaved("resaved", "one", "float16 2x2", HALF))
    run("1x4", resaved("resaved", "1x4", "float16 2x2", HALF) | {"starts": starts})
    powersgd = resaved("powersgd resaved", "4x1", "powersgd 2x2", COMPRESSED)
    run("4x1", resaved("resaved", "4x1", "float16 2x2", HALF) | powersgd)
    return said
