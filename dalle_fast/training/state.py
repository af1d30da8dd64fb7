"""What changes while a model trains, and how it becomes a checkpoint and comes back from one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ..distributed.collectives import Machines
from ..distributed.powersgd import PowerSGD, resblock_matrices, sum_between_machines
from ..distributed.sharding import local, resblocks_of, shard_model, sharded_like
from ..distributed.start import Start
from ..distributed.world import ALONE, World
from ..models import DALLE
from .average import RunningAverage
from .checkpoint import load_tensors, saved_tensors
from .metrics import Incidents, LossSpikes
from .optimizer import AdamW16
from .scales import GradientScales, Scales
from .schedules import Plateau
from .settings import TrainConfig

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class State(Generic[Model]):
    """Everything that changes while training; a checkpoint is this and the random state.

    Of sharded parameters, of their moments and their averages, a process has its shards.
    """

    model: Model
    average: RunningAverage[Model]
    optimizer: AdamW16
    plateau: Plateau | None
    scales: Scales | None = None  # what gradients are multiplied by
    world: World = ALONE  # who trains
    powersgd: PowerSGD | None = None  # what sums the gradients over machines, if not FSDP
    spikes: LossSpikes = field(default_factory=LossSpikes)
    step: int = 0  # finished updates, and so the position in the data
    skipped_updates: int = 0  # for want of a finite gradient
    seconds: float = 0.0
    incidents: Incidents = field(default_factory=Incidents)  # since the last log record; not in checkpoints
    parameters: list[torch.Tensor] = field(init=False)  # in the order of the optimizer
    names: list[str] = field(init=False)  # of these

    def __post_init__(self) -> None:
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        names: dict[torch.Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        self.names = [names[p] for p in self.parameters]
        if self.scales:
            self.scales.watch(self.parameters)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state, by a name of its own; sharded as its parameter is.

        They share the state's memory, but for what PowerSGD has left over on all machines.
        """
        parameters = dict(self.model.named_parameters())
        return {
            **{f"model/{name}": tensor for name, tensor in self.model.state_dict().items()},
            **{
                f"average/{name}": sharded_like(tensor, parameters[name], self.world)
                for name, tensor in self.average.tensors().items()
            },
            **{
                f"optimizer/{name}/{key}": sharded_like(value, parameter, self.world) if value.ndim else value
                for name, parameter in parameters.items()
                for key, value in self.optimizer.state.get(parameter, {}).items()
            },
            **{
                f"group/{i}/{key}": value
                for i, group in enumerate(self.optimizer.param_groups)
                for key, value in group.items()
                if isinstance(value, torch.Tensor)
            },
            **{f"scales/{name}": tensor for name, tensor in (self.scales.tensors() if self.scales else {}).items()},
            **{
                f"powersgd/{name}": sharded_like(tensor, parameters[name], self.world)
                for name, tensor in (self.powersgd.tensors() if self.powersgd else {}).items()
            },
        }

    def values(self) -> dict[str, Any]:
        """The state but for its tensors."""
        return {
            "plateau": asdict(self.plateau) if self.plateau else None,
            "spikes": asdict(self.spikes),
            "step": self.step,
            "skipped_updates": self.skipped_updates,
            "seconds": self.seconds,
        }

    def load(self, path: Path, values: dict[str, Any]) -> None:
        """Become the state of a checkpoint: its folder, and what ``values`` returned when it was written."""
        saved = saved_tensors(path)
        self._make_room(saved)
        # Without scales in it, the run had no 16 bits so far; likewise with what PowerSGD has left over.
        optional = ("scales/", "powersgd/")
        wanted = {name: t for name, t in self.tensors().items() if name in saved or not name.startswith(optional)}
        load_tensors(path, wanted)
        if self.powersgd:
            left = {name.partition("/")[2]: local(t) for name, t in wanted.items() if name.startswith("powersgd/")}
            self.powersgd.load(left)
        if self.plateau and values["plateau"]:
            self.plateau = Plateau(**values["plateau"])
        self.spikes = LossSpikes(**values["spikes"])
        self.step, self.seconds = values["step"], values["seconds"]
        self.skipped_updates = values["skipped_updates"]

    def _make_room(self, saved: dict[str, torch.Tensor]) -> None:
        """Give the optimizer the tensors that it otherwise makes in its first update, with anything in them."""
        parameters, device = dict(self.model.named_parameters()), self.parameters[0].device
        groups = dict(enumerate(self.optimizer.param_groups))
        for name, tensor in saved.items():
            part, _, rest = name.partition("/")
            owner, _, key = rest.rpartition("/")
            if part == "group" and int(owner) in groups:
                groups[int(owner)][key] = torch.empty_like(tensor, device=device)
            elif part == "optimizer" and owner in parameters:
                parameter = parameters[owner].detach()
                like = local(parameter) if tensor.shape == parameter.shape else tensor  # as strided, if it can be
                self.optimizer.state[parameters[owner]][key] = torch.empty_like(like, dtype=tensor.dtype, device=device)


def new_state(
    model: Model,
    config: TrainConfig,
    scales: Scales | None = None,
    world: World = ALONE,
    start: Start | None = None,
) -> State[Model]:
    """The state before the first update, on the device.

    Args:
        model: on the CPU; of many processes perhaps on "meta".
        start: of a model on "meta". Without it anything is in the state until a checkpoint is loaded.

    Raises:
        ValueError: a rank of PowerSGD that the shards of a matrix cannot share.
    """
    rank = config.compression_rank() if world.copies > 1 else None
    if world.size > 1:
        shard_model(model, world, powersgd=rank is not None)
        if start:
            start.write(model, world)
    else:
        model.to(config.device)
    powersgd = (
        compress_gradients(model, rank, config.seed, scales, world) if rank and isinstance(model, DALLE) else None
    )
    optimizer = AdamW16(parameter_groups(model, config), config.lr, config.betas, config.eps)
    average = RunningAverage(model, config.ema_decay)
    return State(model.train(), average, optimizer, config.plateau(), scales, world, powersgd)


def compress_gradients(model: DALLE, rank: int, seed: int, scales: Scales | None, world: World) -> PowerSGD:
    """Have PowerSGD sum the gradients of a sharded model over machines from now on."""
    scale_of = {}
    if isinstance(scales, GradientScales):
        blocks = {id(p): i for i, resblock in enumerate(resblocks_of(model)) for p in resblock.parameters()}
        scale_of = {name: scales.scale[blocks[id(p)]] for name, p in model.named_parameters() if id(p) in blocks}
    return sum_between_machines(model, resblock_matrices(model), rank, Machines(world.peers), seed, scale_of)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer: matrices and filters decay; gains, biases and embeddings do not.

    ``lr_share`` of a group is what the step size is multiplied by for it, ``moments`` what its moments are stored in.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[float, float, str], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        decays = parameter.ndim >= 2 and id(parameter) not in embeddings and "embedding" not in name
        moments = config.moments_of(name) if parameter.ndim >= 2 else "float32"
        key = (config.weight_decay if decays else 0.0, config.lr_share(name), moments)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay, "lr_share": lr_share, "moments": moments}
        for (weight_decay, lr_share, moments), parameters in groups.items()
    ]
