"""The random start of a model that does not fit into one process.

The constructor runs on the device "meta", where tensors have no memory, and its writes into parameters are recorded.
Once the model is sharded, every process replays them in the same order, one whole parameter at a time, and keeps its
shard. So all numbers are those that one process draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from .sharding import local, shard_of
from .world import ALONE, World

Model = TypeVar("Model", bound=nn.Module)
FILLS = {  # the operators that ``torch.nn.init`` calls
    torch.ops.aten.normal_.default,
    torch.ops.aten.uniform_.default,
    torch.ops.aten.fill_.Scalar,
    torch.ops.aten.zero_.default,
}


@dataclass(frozen=True)
class Fill:
    """A recorded write into a tensor: the operator and its further arguments."""

    name: str | None  # None: not in the model any more, but still drawn, to keep the random stream
    like: torch.Tensor  # on "meta"
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """The writes of a model's constructor into its parameters and buffers, in order."""

    seed: int
    fills: list[Fill]

    @torch.no_grad()
    def write(self, model: nn.Module, world: World) -> None:
        """Replay them into the model, which has memory and is sharded by now."""
        tensors = dict(chain(model.named_parameters(), model.named_buffers()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for fill in self.fills:
                whole = torch.empty_like(fill.like, device="cpu")
                fill.function(whole, *fill.args, **fill.kwargs)
                if fill.name is not None:
                    tensor = tensors[fill.name]
                    local(tensor).copy_(shard_of(whole, tensor, world))
                del whole  # before the next one is allocated


def new_model(build: Callable[[], Model], seed: int, world: World = ALONE) -> tuple[Model, Start | None]:
    """A model whose random start depends on the seed alone.

    With many processes the model is on "meta", and its start is returned with it, to be written once it is sharded.

    Args:
        build: the constructor. It fills parameters and buffers in place, as ``torch.nn.init`` does.

    Raises:
        TypeError: it writes into a tensor in a way that cannot be recorded.
        ValueError: it leaves a parameter or a buffer unwritten.
    """
    if world.size == 1:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(), None
    with torch.device("meta"), _Recorder() as recorder:
        model = build()
    names = {id(tensor): name for name, tensor in chain(model.named_parameters(), model.named_buffers())}
    fills = [Fill(names.get(id(tensor)), tensor.detach(), *how) for tensor, *how in recorder.writes]
    if missing := set(names.values()) - {fill.name for fill in fills}:
        raise ValueError(f"{min(missing)}: expected the constructor to fill it in place, got nothing that does")
    return model, Start(seed, fills)


class _Recorder(TorchDispatchMode):
    """Records writes into tensors instead of executing them."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[tuple[torch.Tensor, Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in FILLS:
            self.writes.append((args[0], func, args[1:], kwargs or {}))
            return args[0]
        if func._schema.is_mutable:
            raise TypeError(f"constructor: expected {', '.join(map(str, FILLS))} to write into tensors, got {func}")
        return func(*args, **(kwargs or {}))
