"""Trainings by several processes on this machine, as a program: it forks, which needs a process of its own.

    python many_processes.py FOLDER

makes subfolders of FOLDER, one for each training, and prints JSON: what each process had to say of it.
"""

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which each process would import by itself
from helpers.training import CLIP, DALLE, Memory, settings, task
from torch.distributed import TCPStore

from dalle_fast.distributed.sharding import local, shard_model, shard_of
from dalle_fast.distributed.start import new_model
from dalle_fast.distributed.world import World, join_world
from dalle_fast.models import KINDS
from dalle_fast.training import TrainingStopped, loop
from dalle_fast.training.checkpoint import CheckpointWriter, newest_checkpoint
from dalle_fast.training.loop import fingerprint_of, fit
from dalle_fast.training.state import new_state

Work = Callable[[World], Any]


@dataclass(frozen=True)
class Layout:
    """How many processes, on how many machines."""

    machines: int
    on_each: int
    parallel: str = "fsdp"

    def run(self, work: Work) -> list[Any]:
        """What the processes return, by rank."""
        size = self.machines * self.on_each
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        children = []
        for rank in range(size):
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % self.on_each)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(self.on_each)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
                try:
                    with join_world("cpu", self.parallel) as world:
                        said = work(world)
                    os.write(write, json.dumps(said).encode())
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                os._exit(1)
            os.close(write)
            children.append((pid, read))
        # After the last fork: a child that was forked while the store's thread held a lock would wait for it forever.
        store = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listener.detach())
        said = [b"".join(iter(lambda read=read: os.read(read, 2**16), b"")) for _, read in children]
        statuses = [os.waitpid(pid, 0)[1] for pid, _ in children]
        del store
        if any(statuses):
            sys.exit(f"{self}: a process failed, see above")
        return [json.loads(text) for text in said]


LAYOUTS = {
    "one": Layout(1, 1),
    "2x2": Layout(2, 2),
    "1x4": Layout(1, 4),
    "4x1": Layout(4, 1),
    "ddp": Layout(2, 2, "ddp"),
}
HALF = {"resblock_dtype": "float16"}
COMPRESSED = HALF | {"recompute": False, "powersgd_rank": 32}  # full rank: 16 for each of two shards


def configured(kind: str, **changes):
    return settings(kind, **{"batch_size": 8, "steps": 3, "log_every": 1, **changes})


def train(kind: str, out: Path, changes: dict, spoil: Callable | None = None) -> Work:
    """A training in which everything happens within a few steps; what a process has to say of it."""

    def work(world: World) -> dict:
        config = configured(kind, **changes)
        some = task(kind, config, world)
        if spoil:
            some.loss = spoil(some.loss, world)
        said: dict[str, Any] = {"scales": []}
        update = loop.update

        def watched(state, *rest):
            result = update(state, *rest)
            said["parameters"] = sum(local(p).numel() for p in state.parameters)
            said["scales"] += [state.scales.scale.tolist()] if state.scales else []
            return result

        loop.update = watched
        try:
            model, metrics = fit(some, config, out, world=world)
        except TrainingStopped as stopped:
            return said | {"stopped": [stopped.signum, stopped.step]}
        device = next(model.parameters()).device.type
        return said | {"val_loss": metrics["val_loss"], "device": device}

    return work


def resave(kind: str, source: Path, target: Path, changes: dict) -> Work:
    """Load the newest checkpoint of a training and write it anew."""

    def work(world: World) -> None:
        config = configured(kind, **changes)
        some = task(kind, config, world)
        fingerprint = fingerprint_of(some, config)
        state = new_state(some.model, config, some.scales, world)
        state.load(*newest_checkpoint(source / kind / "checkpoints", fingerprint))
        with CheckpointWriter(target / kind / "checkpoints", 1, world) as writer:
            writer.save(state.step, state.tensors(), {"fingerprint": fingerprint, **state.values()})

    return work


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
    """In the second update the gradients of the last process are not finite."""

    def spoilt(model, batch, step):
        value, metrics = loss(model, batch, step)
        return value * (float("inf") if step == 1 and world.rank == world.size - 1 else 1.0), metrics

    return spoilt


def signal_to_last(loss, world: World):
    """In the second update the last process is asked to stop."""

    def spoilt(model, batch, step):
        if step == 1 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(model, batch, step)

    return spoilt


def main(out: Path) -> None:
    torch.set_num_threads(1)
    said = {}

    def run(name: str, layout: str, work: Callable[[Path], Work]) -> None:
        said[f"{name} {layout}"] = LAYOUTS[layout].run(work(out / f"{name} {layout}"))

    for layout, recompute in (("one", True), ("2x2", True), ("ddp", False)):
        run("float32", layout, lambda path, recompute=recompute: train("dalle", path, {"recompute": recompute}))
    for layout in ("one", "2x2"):
        run("float16", layout, lambda path: train("dalle", path, HALF, overflow_in_last))
        run("clip", layout, lambda path: train("clip", path, {"val_samples": 6}))
    run("powersgd", "2x2", lambda path: train("dalle", path, COMPRESSED, overflow_in_last))
    run("powersgd resaved", "4x1", lambda path: resave("dalle", out / "powersgd 2x2", path, COMPRESSED))
    for layout in ("one", "1x4", "4x1"):
        run("resaved", layout, lambda path: resave("dalle", out / "float16 2x2", path, HALF))
    run("dvae", "2x2", lambda path: train("dvae", path, {"conv_dtype": "float16"}))
    run("starts", "1x4", lambda path: starts)
    run("stopped", "2x2", lambda path: train("dalle", path, {}, signal_to_last))
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
