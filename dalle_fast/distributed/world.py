"""The processes of a training: one alone, or many that ``torchrun`` has started on some machines (section 2.5).

Those of a machine share one copy of the model, each with a shard of every parameter. The machines hold copies of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all processes of a training; without arguments, the only one.

    The methods are collective: every process must call them, in the same order.

    Args:
        rank: number of this process; processes of a machine follow one another.
        size: how many processes there are.
        shards: how many share a copy of the model.
        device: where tensors must be to be sent.
        mesh: those that share this process's copy.
        host_mesh: the same, for tensors on the CPU.
        peers: those that have the same shard of the other copies, and this one.
        decisions: all, for what the host decides; for tensors on the CPU.
        checkpoints: all, for a thread that writes checkpoints; for tensors on the CPU.
    """

    rank: int = 0
    size: int = 1
    shards: int = 1
    device: str = "cpu"
    mesh: DeviceMesh | None = None
    host_mesh: DeviceMesh | None = None
    peers: dist.ProcessGroup | None = None
    decisions: dist.ProcessGroup | None = None
    checkpoints: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def copies(self) -> int:
        """How many copies of the model there are."""
        return self.size // self.shards

    @property
    def shard(self) -> int:
        """Which shard of its copy this process has."""
        return self.rank % self.shards

    def sum(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The sums of tensors over all processes, in float64 and in one message; of one process, the tensors."""
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([tensor.detach().reshape(-1).to(self.device, torch.float64) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def gather_batch(self, part: torch.Tensor) -> torch.Tensor:
        """The parts [B, ...] of a batch that the processes have, as one batch [size * B, ...], with gradients."""
        return part if self.size == 1 else _GatherBatch.apply(part)

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes give."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.decisions)
        return int(largest)

    def gather(self, value: T) -> list[T]:
        """The values that the processes give, in the order of their ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, self.decisions)
        return values

    def ask_first(self, question: Callable[[], T]) -> T:
        """What a function returns, or raises, in the first process, the only one to call it."""
        if self.size == 1:
            return question()
        answer: list[Any] = [None, None]  # the value, and the error
        if self.is_first:
            try:
                answer[0] = question()
            except Exception as error:  # for all to raise
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, group=self.decisions)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]


class _GatherBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)  # what the losses of all processes make of this one's part
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


ALONE = World()


def this_process() -> tuple[int, int]:
    """The rank of this process, and how many ``torchrun`` has started: also where they never meet."""
    return _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)


def device_of_process(device: str) -> torch.device:
    """The device; of "cuda" each process that ``torchrun`` has started on a machine takes a GPU of its own."""
    if device != "cuda":
        return torch.device(device)
    _, size = this_process()
    return torch.device("cuda", _from_environment("LOCAL_RANK", 0 if size == 1 else None))


@contextmanager
def join_world(device: str, parallel: Literal["fsdp", "ddp"] = "fsdp") -> Iterator[World]:
    """Meet the other processes, if ``torchrun`` has started any, and part from them at the end.

    Args:
        device: of the training, such as "cpu" or "cuda"; each process of a machine takes a GPU of its own.
        parallel: "fsdp" has the processes of a machine share a copy of the model, with "ddp" each has its own.

    Raises:
        ValueError: the environment is not one that torchrun makes, or the device has an index.
    """
    _, size = this_process()
    if size == 1:
        yield ALONE
        return
    place = torch.device(device)
    if place.type not in BACKENDS or place.index is not None:
        raise ValueError(f"device: expected one of {', '.join(BACKENDS)} with many processes, got {device}")
    rank, on_machine = _from_environment("RANK"), _from_environment("LOCAL_WORLD_SIZE")
    if not 0 <= rank < size or not 1 <= on_machine <= size or size % on_machine:
        raise ValueError(
            "environment: expected that of torchrun with as many processes on every machine, got "
            f"RANK={rank}, WORLD_SIZE={size}, LOCAL_WORLD_SIZE={on_machine}"
        )
    if place.type == "cuda":
        place = device_of_process(device)
        torch.cuda.set_device(place)
    store, _, _ = next(dist.rendezvous("env://"))
    # torchrun keeps its store when it replaces a killed worker, with the addresses of the dead in it.
    store = dist.PrefixStore(f"restart {_from_environment('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(BACKENDS[place.type], store=store, rank=rank, world_size=size)
    try:
        shards = on_machine if parallel == "fsdp" else 1
        mesh, host_mesh = (
            init_device_mesh(kind, (size // shards, shards), mesh_dim_names=("copy", "shard"))
            for kind in (place.type, "cpu")
        )
        yield World(
            rank,
            size,
            shards,
            str(place),
            mesh["shard"],
            host_mesh["shard"],
            mesh.get_group("copy"),
            dist.new_group(backend="gloo"),
            dist.new_group(backend="gloo"),
        )
    finally:
        dist.destroy_process_group()


def _from_environment(name: str, default: int | None = None) -> int:
    """A number that torchrun sets."""
    value = os.environ.get(name, default)
    try:
        return int(value)  # type: ignore[arg-type] # None is caught
    except (TypeError, ValueError):
        raise ValueError(f"environment: expected {name} to be a number, as torchrun sets it, got {value}") from None
