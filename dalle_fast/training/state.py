"""The state of a training: everything that changes while a model trains, to and from checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ..distributed.collectives import Nodes
from ..distributed.powersgd import PowerSGD, resblock_matrices, sum_between_nodes
from ..distributed.sharding import local, shard_model, sharded_like
from ..distributed.start import Start
from ..distributed.world import ALONE, World
from ..models.base import TrainableModel
from .average import RunningAverage
from .checkpoint import check_random_state, load_tensors, saved_tensors
from .metrics import Incidents, LossSpikes
from .optimizer import AdamW16
from .scales import GradientScales, Scales
from .schedules import Plateau
from .settings import TrainConfig

Model = TypeVar("Model", bound=TrainableModel)


@dataclass
class State(Generic[Model]):
    """Everything that changes while training; a checkpoint holds this and the random state.

    A process has its shards of sharded parameters, their moments and their averages.
    """

    model: Model
    average: RunningAverage[Model]
    optimizer: AdamW16
    plateau: Plateau | None
    scales: Scales | None = None  # of the gradients
    world: World = ALONE
    powersgd: PowerSGD | None = None  # sums the gradients over nodes, instead of FSDP
    spikes: LossSpikes = field(default_factory=LossSpikes)
    step: int = 0  # finished steps, and so the position in the data
    skipped_steps: int = 0  # those without a finite gradient
    skipped_in_a_row: int = 0  # the last of them
    seconds: float = 0.0
    incidents: Incidents = field(default_factory=Incidents)  # since the last log record; not in checkpoints
    parameters: list[torch.Tensor] = field(init=False)  # in the order of the optimizer
    names: list[str] = field(init=False)  # of the parameters
    places: list[str] = field(init=False)  # of the parameters: the resblock, or else the module, of each

    def __post_init__(self) -> None:
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        names: dict[torch.Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        self.names = [names[p] for p in self.parameters]
        places = places_of(self.model)
        self.places = [places[name] for name in self.names]
        if self.scales:
            self.scales.watch(self.parameters)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state, by a unique name; sharded like its parameter.

        They share the state's memory, except the sums of PowerSGD's error buffers.
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
        """The state without its tensors."""
        return {
            "plateau": asdict(self.plateau) if self.plateau else None,
            "spikes": asdict(self.spikes),
            "step": self.step,
            "skipped_updates": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seconds": self.seconds,
        }

    def load(self, path: Path, values: dict[str, Any]) -> None:
        """Load the state from the folder of a checkpoint, with what ``values`` returned when it was written."""
        saved = saved_tensors(path)
        self._make_room(saved)
        # A checkpoint without scales is of a run that had no 16 bits so far; likewise without PowerSGD's buffers.
        optional = ("scales/", "powersgd/")
        wanted = {name: t for name, t in self.tensors().items() if name in saved or not name.startswith(optional)}
        load_tensors(path, wanted)
        if self.powersgd:
            sums = {name.partition("/")[2]: local(t) for name, t in wanted.items() if name.startswith("powersgd/")}
            self.powersgd.load(sums)
        if self.plateau and values["plateau"]:
            self.plateau = Plateau(**values["plateau"])
        self.spikes = LossSpikes(**values["spikes"])
        self.step, self.seconds = values["step"], values["seconds"]
        self.skipped_steps = values["skipped_updates"]
        self.skipped_in_a_row = values.get("skipped_in_a_row", 0)  # old checkpoints lack it

    def _make_room(self, saved: dict[str, torch.Tensor]) -> None:
        """Allocate the tensors, uninitialised, that the optimizer otherwise makes in its first step."""
        parameters, device = dict(self.model.named_parameters()), self.parameters[0].device
        groups = dict(enumerate(self.optimizer.param_groups))
        for name, tensor in saved.items():
            part, _, rest = name.partition("/")
            owner, _, key = rest.rpartition("/")
            if part == "group" and int(owner) in groups:
                groups[int(owner)][key] = torch.empty_like(tensor, device=device)
            elif part == "optimizer" and owner in parameters:
                parameter = parameters[owner].detach()
                like = local(parameter) if tensor.shape == parameter.shape else tensor  # with its strides, if possible
                self.optimizer.state[parameters[owner]][key] = torch.empty_like(like, dtype=tensor.dtype, device=device)


def check_values(step: int, values: Mapping[str, Any], device: torch.device) -> None:
    """Raise ValueError unless ``State.load`` and ``set_random_state`` can use the values of a checkpoint.

    Args:
        step: finished steps, by the name of the checkpoint.
    """
    names = {"files", "fingerprint", "random", "plateau", "spikes", "step", "skipped_updates", "seconds"}
    if differing := names ^ (values.keys() - {"skipped_in_a_row"}):
        raise ValueError(f"expected {', '.join(sorted(names))}, got more or less: {', '.join(sorted(differing))}")
    if values["step"] != step or type(values["step"]) is not int:
        raise ValueError(f"step: expected {step}, got {values['step']}")
    skipped, in_a_row = values["skipped_updates"], values.get("skipped_in_a_row", 0)
    if not (type(skipped) is type(in_a_row) is int and 0 <= in_a_row <= skipped <= step):
        raise ValueError(f"skipped steps: expected at most {step}, got {skipped}, of which {in_a_row} in a row")
    seconds = values["seconds"]
    if type(seconds) not in (int, float) or not 0 <= seconds < 2**63:
        raise ValueError(f"seconds: expected 0 or more, got {seconds}")
    _check_fields(LossSpikes, values["spikes"])
    if values["plateau"] is not None:
        _check_fields(Plateau, values["plateau"])
    try:
        check_random_state(values["random"], device)
    except Exception as error:  # each generator has its own
        raise ValueError(f"random: expected states of the generators, got {type(error).__name__}: {error}") from None


def _check_fields(kind: type[LossSpikes] | type[Plateau], values: Any) -> None:
    """Raise ValueError unless the values are those of the fields of LossSpikes or Plateau."""
    types = {f.name: f.type for f in fields(kind)}
    if not isinstance(values, dict) or values.keys() != types.keys():
        raise ValueError(f"expected {', '.join(types)}, got {values}")
    for name, value in values.items():
        of_type = (type(value) is int and abs(value) < 2**63) or (types[name] == "float" and type(value) is float)
        if not of_type or math.isnan(value) or (value < 0 and name not in ("mean", "total", "best")):
            raise ValueError(f"{name}: expected a number of type {types[name]}, got {value}")


def new_state(
    model: Model,
    config: TrainConfig,
    scales: Scales | None = None,
    world: World = ALONE,
    start: Start | None = None,
) -> State[Model]:
    """The state before the first step, on the device.

    Args:
        model: on the CPU; with many processes perhaps on "meta".
        start: of a model on "meta". Without it the state is uninitialised until a checkpoint is loaded.

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
    powersgd = compress_gradients(model, rank, config.seed, scales, world) if rank else None
    optimizer = AdamW16(parameter_groups(model, config), config.lr, config.betas, config.eps)
    average = RunningAverage(model, config.ema_decay)
    return State(model.train(), average, optimizer, config.plateau(), scales, world, powersgd)


def compress_gradients(model: TrainableModel, rank: int, seed: int, scales: Scales | None, world: World) -> PowerSGD:
    """Have PowerSGD sum the gradients of a sharded model over nodes from now on."""
    scale_of = {}
    if isinstance(scales, GradientScales):
        blocks = {id(p): i for i, (_, resblock) in enumerate(model.resblocks()) for p in resblock.parameters()}
        scale_of = {name: scales.scale[blocks[id(p)]] for name, p in model.named_parameters() if id(p) in blocks}
    matrices, nodes = resblock_matrices(model), Nodes(world.peers)
    return sum_between_nodes(model, matrices, rank, nodes, seed, scale_of, model.stacked_matrices())


def places_of(model: TrainableModel) -> dict[str, str]:
    """The resblock of each parameter, or else its module, by name; the log names these."""
    places = {name: name.rpartition(".")[0] or name for name, _ in model.named_parameters()}
    for resblock, module in model.resblocks():
        places |= {f"{resblock}.{name}": resblock for name, _ in module.named_parameters()}
    return places


def parameter_groups(model: TrainableModel, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer: matrices and filters decay; gains, biases and embeddings do not.

    ``lr_share`` of a group is the factor of its step size, ``moments`` the format of its moments.
    """
    embeddings = model.embeddings()
    inside = {parameter for _, resblock in model.resblocks() for parameter in resblock.parameters()}
    shares = {
        parameter: share
        for part, share in config.lr_shares().items()
        for parameter in model.get_submodule(part).parameters()
    }
    groups: dict[tuple[float, float, str], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        decays = parameter.ndim >= 2 and parameter not in embeddings
        moments = config.resblock_moments() if parameter.ndim >= 2 and parameter in inside else "float32"
        key = (config.weight_decay if decays else 0.0, shares.get(parameter, 1.0), moments)
        groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay, "lr_share": lr_share, "moments": moments}
        for (weight_decay, lr_share, moments), parameters in groups.items()
    ]
