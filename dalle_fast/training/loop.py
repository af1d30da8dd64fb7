"""The training loop that the three models share.

One update: a batch, the loss, its gradient, clipping, AdamW with the step size of the schedule, the running average of
the parameters. Now and then: a log record, a validation with the averaged parameters, a checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import nn
from tqdm import tqdm

from ..models import save_model
from ..models.precision import Scales
from ..ops import gradient_norm
from .average import RunningAverage
from .checkpoint import (
    CheckpointWriter,
    load_tensors,
    newest_checkpoint,
    random_state,
    saved_tensors,
    set_random_state,
)
from .config import TrainConfig
from .errors import TrainingDiverged, TrainingStopped
from .memory import keep_freed_memory
from .metrics import Incidents, Log, LossSpikes, Meter, Metrics
from .optimizer import AdamW16
from .schedules import Plateau
from .signals import stop_signals

MAX_SKIPPED_IN_A_ROW = 100  # updates without a finite gradient, after which training is given up
Batch = dict[str, Any]
Model = TypeVar("Model", bound=nn.Module)


class Task(Protocol[Model]):
    """What the loop must know of a model and its data; see ``tasks.py``."""

    kind: str  # names the model's file and the folder of its training
    model: Model  # with its sizes in ``cfg``
    scales: Scales | None  # of its gradients, in 16 bits

    def batches(self, start: int) -> Iterator[Batch]:
        """The batches of steps ``start``, ``start + 1``, ...; a pure function of the step."""

    def loss(self, model: Model, batch: Batch, step: int) -> tuple[torch.Tensor, Metrics]:
        """What to descend, and what to log beside it."""

    def validation(self) -> Iterable[tuple[Batch, int]]:
        """Held-out batches and their numbers of samples, the same each time; empty if there is no such data."""

    def evaluate(self, model: Model, batch: Batch) -> Metrics:
        """Metrics of a held-out batch, ``loss`` among them."""

    def report_skipped(self, path: Path) -> None:
        """Write which samples were left out, and why."""


@dataclass
class State(Generic[Model]):
    """Everything that changes while training; a checkpoint is this and the random state."""

    model: Model
    average: RunningAverage[Model]
    optimizer: AdamW16
    plateau: Plateau | None
    scales: Scales | None = None  # what gradients are multiplied by
    spikes: LossSpikes = field(default_factory=LossSpikes)
    step: int = 0  # finished updates, and so the position in the data
    skipped_updates: int = 0  # for want of a finite gradient
    seconds: float = 0.0
    incidents: Incidents = field(default_factory=Incidents)  # since the last log record; not in checkpoints
    parameters: list[torch.Tensor] = field(init=False)  # in the order of the optimizer

    def __post_init__(self) -> None:
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.scales:
            self.scales.watch(self.parameters)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the state, by a name of its own."""
        return {
            **{f"model/{name}": tensor for name, tensor in self.model.state_dict().items()},
            **{f"average/{name}": tensor for name, tensor in self.average.tensors().items()},
            **{
                f"optimizer/{name}/{key}": value
                for name, parameter in self.model.named_parameters()
                for key, value in self.optimizer.state.get(parameter, {}).items()
            },
            **{
                f"group/{i}/{key}": value
                for i, group in enumerate(self.optimizer.param_groups)
                for key, value in group.items()
                if isinstance(value, torch.Tensor)
            },
            **{f"scales/{name}": tensor for name, tensor in (self.scales.tensors() if self.scales else {}).items()},
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
        # Without scales in it, the run had no 16 bits so far.
        wanted = {name: t for name, t in self.tensors().items() if name in saved or not name.startswith("scales/")}
        load_tensors(path, wanted)
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
                like = parameter if tensor.shape == parameter.shape else tensor  # as strided, if it can be
                self.optimizer.state[parameters[owner]][key] = torch.empty_like(like, dtype=tensor.dtype, device=device)


def fit(task: Task[Model], config: TrainConfig, out: str | Path, resume: bool = True) -> tuple[Model, dict[str, float]]:
    """Train a model to the end, or on to the end from the checkpoint of an earlier run.

    Args:
        task: the model and its data.
        config: how to train it.
        out: the folder of the text-to-image system. The averaged model is written to ``<kind>.safetensors``, and
            ``checkpoints``, ``log.jsonl`` and ``skipped.jsonl`` to the folder ``<kind>``.
        resume: go on from the newest intact checkpoint found there. Otherwise all are deleted.

    Returns:
        the averaged model, on the CPU and in eval mode, and its metrics: those of the last validation as ``val_...``.

    Raises:
        TrainingStopped: on SIGINT or SIGTERM, after saving.
        ValueError: the checkpoint belongs to another model, seed or batch size, or none is intact.
        TrainingDiverged: the loss is not finite any more.
    """
    out, device = Path(out), torch.device(config.device)
    folder = out / task.kind
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = fingerprint_of(task, config)
    checkpoint = newest_checkpoint(folder / "checkpoints", fingerprint) if resume else None

    if device.type == "cpu":
        keep_freed_memory()
    state = new_state(task.model.to(device), config, task.scales)
    if checkpoint:
        state.load(*checkpoint)
        set_random_state(checkpoint[1]["random"], device)
    writer = CheckpointWriter(folder / "checkpoints", config.keep_checkpoints)
    if not resume:
        writer.clear()

    metrics: dict[str, float] = {}  # the newest of each
    meter, skipped_in_a_row = Meter(), 0
    start = time.perf_counter() - state.seconds
    bar = tqdm(total=config.steps, initial=state.step, desc=task.kind, unit="step", disable=None)  # None: on a tty only
    log = Log(folder / "log.jsonl", state.step, config.tensorboard)
    with stop_signals() as signals, writer, log, bar:
        batches = task.batches(state.step)
        while state.step < config.steps:
            lr = config.lr_at(state.step) * (state.plateau.scale if state.plateau else 1.0)
            finite, values = update(state, task, to_device(next(batches), device), lr, config)
            state.step += 1
            state.seconds = time.perf_counter() - start
            if finite:
                meter.add(values)
                skipped_in_a_row = 0
            else:
                state.skipped_updates += 1
                skipped_in_a_row += 1
                patience = MAX_SKIPPED_IN_A_ROW
                if state.scales and bool(values["loss"].isfinite()):
                    patience = state.scales.patience  # scales that are too large come down in time
                if skipped_in_a_row >= patience:
                    raise TrainingDiverged(f"gradient: expected a finite one, got none in {skipped_in_a_row} updates")

            last = state.step == config.steps
            bar.update()
            if last or state.step % config.log_every == 0:
                counters = {"lr": lr, "skipped_updates": state.skipped_updates, "seconds": state.seconds}
                record = meter.result() | counters
                log.write(state.step, record | state.incidents.result())
                if state.scales:
                    log.write(state.step, state.scales.record())
                bar.set_postfix(loss=record.get("loss"))
                metrics |= record
            if last or state.step % config.val_every == 0:
                with state.average.in_model() as model:
                    record = validate(task, model, device)
                log.write(state.step, record)
                metrics |= record
            if last or signals:
                with state.average.in_model() as model:
                    save_model(model, out / f"{task.kind}.safetensors")
            if last or signals or state.step % config.save_every == 0:
                run = {"fingerprint": fingerprint, "random": random_state(device), **state.values()}
                writer.save(state.step, state.tensors(), run)
                task.report_skipped(folder / "skipped.jsonl")
            if last or signals:
                writer.wait()
            if signals:
                raise TrainingStopped(signals[0], state.step)
    state.average.swap()  # for good
    model = state.model.cpu().eval().requires_grad_(False)
    return model, metrics or {**validate(task, model, torch.device("cpu")), "seconds": state.seconds}


def new_state(model: Model, config: TrainConfig, scales: Scales | None = None) -> State[Model]:
    """The state before the first update."""
    optimizer = AdamW16(parameter_groups(model, config), config.lr, config.betas, config.eps)
    return State(model.train(), RunningAverage(model, config.ema_decay), optimizer, config.plateau(), scales)


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


def update(
    state: State[Model], task: Task[Model], batch: Batch, lr: float, config: TrainConfig
) -> tuple[bool, Metrics]:
    """One update of the parameters and their average; whether it was made, and the metrics of the batch.

    Without a finite loss and gradient nothing changes: an update that is skipped does less harm than a NaN. The scales
    may confine that to a resblock.
    """
    loss, metrics = task.loss(state.model, batch, state.step)
    loss.backward()
    factors = state.scales.factors() if state.scales else None
    norm, nonfinite = gradient_norm([cast(torch.Tensor, p.grad) for p in state.parameters], factors)
    skip = state.scales.skip(nonfinite) if state.scales else nonfinite.any().expand_as(nonfinite)
    # All that the host must know, in one wait for the device.
    made, blameless, value = torch.stack([loss.isfinite() & ~skip.all(), ~nonfinite.any(), loss.detach()]).tolist()
    finite = bool(made)
    if not blameless:
        names: dict[torch.Tensor, str] = {p: name for name, p in state.model.named_parameters()}
        bad = nonfinite.tolist()
        state.incidents.add_nonfinite(names[p] for p, is_bad in zip(state.parameters, bad, strict=True) if is_bad)
    if finite:
        if state.spikes.update(value):
            state.incidents.add_spike(state.step + 1)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group["lr_share"]
        clip = (config.clip_norm / norm).clamp(max=1) if config.clip_norm else None
        state.average.keep_parameters()
        state.optimizer.step(unscale=factors, clip=clip, skip=skip if state.scales else None)
        if state.plateau and state.step >= config.warmup_steps:
            state.plateau.update(value)
        if (state.step + 1) % config.ema_every == 0:
            state.average.update((state.step + 1) // config.ema_every)
    if state.scales:
        state.scales.update()
    state.optimizer.zero_grad()
    return finite, {"loss": loss.detach(), "grad_norm": norm, **metrics}


@torch.no_grad()
def validate(task: Task[Model], model: Model, device: torch.device) -> dict[str, float]:
    """Metrics over the held-out data as ``val_...``; nothing when there is none."""
    meter = Meter()
    for batch, size in task.validation():
        meter.add(task.evaluate(model, to_device(batch, device)), size)
    return {f"val_{name}": value for name, value in meter.result().items()}


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def fingerprint_of(task: Task[Model], config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint must agree in with the run that resumes it: model, moments, and what decides the data."""
    sizes = json.loads(json.dumps(asdict(cast(Any, task.model.cfg))))  # tuples become lists, as they are read back
    moments = [group["moments"] for group in parameter_groups(task.model, config)]
    return {"kind": task.kind, "seed": config.seed, "batch_size": config.batch_size, "moments": moments, **sizes}
