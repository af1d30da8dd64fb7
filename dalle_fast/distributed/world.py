"""The processes of a training: one alone, or those that ``torchrun`` has started on one or more nodes (section 2.5).

The processes of a node share one copy of the model, each with a shard of every parameter. Every node holds a copy.
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
        rank: of this process; the processes of a node have consecutive ranks.
        size: number of processes.
        shards: number of processes that share a copy of the model.
        device: of the tensors that are sent.
        mesh: the processes that share this one's copy.
        host_mesh: the same, for tensors on the CPU.
        peers: the processes that hold this one's shard of each copy.
        decisions: all processes, for decisions of the host; for tensors on the CPU.
        checkpoints: all processes, for the thread that writes checkpoints; for tensors on the CPU.
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
        """True in the process that writes logs, reports and exports."""
        return self.rank == 0

    @property
    def copies(self) -> int:
        """Number of copies of the model."""
        return self.size // self.shards

    @property
    def shard(self) -> int:
        """Index of this process's shard of its copy."""
        return self.rank % self.shards

    def sum(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Sums of tensors over all processes, in float64 and in one message; with one process, the tensors."""
        if self.size == 1:
            return list(tensors)
        flat = torch.cat([tensor.detach().reshape(-1).to(self.device, torch.float64) for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def gather_batch(self, part: torch.Tensor) -> torch.Tensor:
        """Concatenate the processes' parts [B, ...] of a batch, [size * B, ...]; differentiable."""
        return part if self.size == 1 else _GatherBatch.apply(part)

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.decisions)
        return int(largest)

    def gather(self, value: T) -> list[T]:
        """The processes' values, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, self.decisions)
        return values

    def ask_first(self, question: Callable[[], T]) -> T:
        """Call a function in the first process alone; all return, or raise, what it does."""
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
        dist.all_reduce(grad)  # the losses of all processes depend on this one's part
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


ALONE = World()


def this_process() -> tuple[int, int]:
    """Rank and number of the processes that ``torchrun`` has started, without joining them."""
    return _from_environment("RANK", 0), _from_environment("WORLD_SIZE", 1)


def check_device(device: str | torch.device) -> torch.device:
    """The device of a name such as "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: no such name, or a device that this node or this torch does not have.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in BACKENDS:
        raise ValueError(f"device: expected {' or '.join(BACKENDS)}, got {str(device)!r}")
    index = found.index or 0
    if found.type == "cuda" and not torch.cuda.is_available():
        why = "was built without CUDA" if torch.version.cuda is None else "finds no GPU"
        raise ValueError(f"device: expected one that is there, got {device}, but this torch {why}; cpu always is")
    count = 1 if found.type == "cpu" else torch.cuda.device_count()
    if not 0 <= index < count:
        raise ValueError(f"device: expected an index below {count}, got {device}")
    return found


def device_of_process(device: str) -> torch.device:
    """The device of this process, checked; for "cuda", each process of a node takes a GPU of its own."""
    place = check_device(device)
    if device != "cuda":
        return place
    _, size = this_process()
    return torch.device("cuda", _from_environment("LOCAL_RANK", 0 if size == 1 else None))


@contextmanager
def join_world(device: str, parallel: Literal["fsdp", "ddp"] = "fsdp") -> Iterator[World]:
    """Join the other processes, if ``torchrun`` has started any, and leave them at the end.

    Args:
        device: of the training, such as "cpu" or "cuda"; each process of a node takes a GPU of its own.
        parallel: with "fsdp" the processes of a node share a copy of the model, with "ddp" each has its own.

    Raises:
        ValueError: an environment that torchrun does not make, a device that is not there, or one with an index.
    """
    _, size = this_process()
    if size > 1 and device not in BACKENDS:
        raise ValueError(f"device: expected one of {', '.join(BACKENDS)} with many processes, got {device}")
    place = check_device(device)
    if size == 1:
        yield ALONE
        return
    rank, on_node = _from_environment("RANK"), _from_environment("LOCAL_WORLD_SIZE")
    if not 0 <= rank < size or not 1 <= on_node <= size or size % on_node:
        raise ValueError(
            "environment: expected that of torchrun with as many processes on every node, got "
            f"RANK={rank}, WORLD_SIZE={size}, LOCAL_WORLD_SIZE={on_node}"
        )
    if place.type == "cuda":
        place = device_of_process(device)
        torch.cuda.set_device(place)
    store, _, _ = next(dist.rendezvous("env://"))
    # torchrun keeps its store when it replaces a killed worker, still holding the addresses of dead workers.
    store = dist.PrefixStore(f"restart {_from_environment('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(BACKENDS[place.type], store=store, rank=rank, world_size=size)
    try:
        shards = on_node if parallel == "fsdp" else 1
        mesh, host_mesh = (
            init_device_mesh(kind, (size // shards, shards), mesh_dim_names=("copy", "shard"))
            for kind in (place.type, "cpu")
        )
        yield World(
            rank=rank,
            size=size,
            shards=shards,
            device=str(place),
            mesh=mesh["shard"],
            host_mesh=host_mesh["shard"],
            peers=mesh.get_group("copy"),
            decisions=dist.new_group(backend="gloo"),
            checkpoints=dist.new_group(backend="gloo"),
        )
    finally:
        dist.destroy_process_group()


def _from_environment(name: str, default: int | None = None) -> int:
    """An integer that torchrun sets."""
    value = os.environ.get(name, default)
    try:
        return int(value)  # type: ignore[arg-type] # None raises TypeError
    except (TypeError, ValueError):
        raise ValueError(f"environment: expected {name} to be a number, as torchrun sets it, got {value}") from None
