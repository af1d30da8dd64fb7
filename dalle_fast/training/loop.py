"""The training loop that the three models share.

One step: a batch, the loss, its gradient, clipping, AdamW with the step size of the schedule, the running average of
the parameters. Every so many steps: a log record, a validation with the averaged parameters, a checkpoint.
"""

from __future__ import annotations

import ctypes
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from tqdm import tqdm

from ..data.batches import Batch
from ..distributed.sharding import backward, counted_here, gather_model, local
from ..distributed.start import Start
from ..distributed.world import ALONE, World
from ..models import save_model
from ..models.base import TrainableModel
from ..ops import gradient_norm
from .checkpoint import CORPUS, TRAINED_WITH, CheckpointWriter, newest_checkpoint, random_state, set_random_state
from .lock import locked
from .metrics import Log, Meter, Metrics
from .scales import Scales
from .settings import TrainConfig
from .state import State, check_values, new_state, parameter_groups
from .stopping import TrainingDiverged, TrainingStopped, stop_signals

MAX_SKIPPED_IN_A_ROW = 100  # steps without a finite gradient, after which the training is given up
Model = TypeVar("Model", bound=TrainableModel)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


class Task(Protocol[Model]):
    """A model and its data, as the loop sees them; see ``task.py``."""

    kind: str  # name of the model's file and of the folder of its training
    corpus: str  # describes the training data, to tell them from others
    model: Model
    start: Start | None  # the random start of a model on "meta"
    scales: Scales | None  # of its gradients in 16 bits

    def batches(self, start: int) -> Iterator[Batch]:
        """The batches of steps ``start``, ``start + 1``, ...; a pure function of the step."""

    def loss(self, model: Model, batch: Batch, step: int) -> tuple[torch.Tensor, Metrics]:
        """The loss to descend, and metrics to log beside it."""

    def validation(self) -> Iterable[tuple[Batch, int]]:
        """Held-out batches and their numbers of samples, the same each time; empty without held-out data."""

    def evaluate(self, model: Model, batch: Batch) -> Metrics:
        """Metrics of a held-out batch, ``loss`` among them."""

    def continue_report(self, path: Path) -> None:
        """Go on with the report of skipped samples of the run that is resumed."""

    def report_skipped(self, path: Path) -> None:
        """Write the names of skipped samples, and why they were skipped."""


def fit(
    task: Task[Model], config: TrainConfig, out: str | Path, resume: bool = True, world: World = ALONE
) -> tuple[Model, dict[str, float]]:
    """Train a model to the end, or on to the end from the checkpoint of an earlier run.

    Args:
        task: the model and its data.
        config: how to train it.
        out: the folder of the text-to-image system. The averaged model is written to ``<kind>.safetensors``, and
            ``checkpoints``, ``log.jsonl`` and ``skipped.jsonl`` to the folder ``<kind>``. All nodes must share it.
        resume: go on from the newest intact checkpoint found there, of any number of processes. Otherwise all are
            deleted.
        world: the processes that train together. All must call this.

    Returns:
        The averaged model, on the CPU and in eval mode, and its metrics: those of the last validation as ``val_...``.
        With many processes only the first has the model's values; the others have it on the device "meta".

    Raises:
        TrainingStopped: on SIGINT, SIGTERM or SIGHUP, to any of the processes, after saving.
        ValueError: the checkpoint belongs to another model, corpus, seed or batch size, or none is intact; or another
            training runs in the same folder.
        TrainingDiverged: too many steps in a row, or the last ones, had no finite gradient, or the model that came out
            is not finite. Nothing is exported, and the next run goes on from a checkpoint before these steps.
    """
    folder = Path(out) / task.kind
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        world.ask_first(lambda: stack.enter_context(locked(folder)))
        return _fit(task, config, folder, resume, world)


def _fit(
    task: Task[Model], config: TrainConfig, folder: Path, resume: bool, world: World
) -> tuple[Model, dict[str, float]]:
    device, exported = torch.device(config.device), folder.parent / f"{task.kind}.safetensors"
    fingerprint = fingerprint_of(task, config)
    check = partial(check_values, device=device)
    found = partial(newest_checkpoint, folder / "checkpoints", fingerprint, check)
    checkpoint = world.ask_first(found) if resume else None

    if device.type == "cpu":
        keep_freed_memory()
    state = new_state(task.model, config, task.scales, world, None if checkpoint else task.start)
    if checkpoint:
        state.load(*checkpoint)
        if world.is_first:  # it belongs to rank 0; others never use it
            set_random_state(checkpoint[1]["random"], device)
        task.continue_report(folder / "skipped.jsonl")
    writer = CheckpointWriter(folder / "checkpoints", config.keep_checkpoints, world)
    if not resume:
        world.ask_first(writer.clear)

    metrics: dict[str, float] = {}  # the newest of each
    meter, save_is_due = Meter(world), False
    start = time.perf_counter() - state.seconds
    hidden = None if world.is_first else True  # None: on a tty only
    bar = tqdm(total=config.steps, initial=state.step, desc=task.kind, unit="step", disable=hidden)
    log = Log(folder / "log.jsonl" if world.is_first else None, state.step, config.tensorboard)
    with stop_signals() as signals, writer, log, bar:
        batches = task.batches(state.step)
        while state.step < config.steps:
            lr = config.lr_at(state.step) * (state.plateau.scale if state.plateau else 1.0)
            finite, values = train_step(state, task, to_device(next(batches), device), lr, config)
            state.step += 1
            state.seconds = time.perf_counter() - start
            if finite:
                meter.add(values)
                state.skipped_in_a_row = 0
            else:
                state.skipped_steps += 1
                state.skipped_in_a_row += 1
            last = state.step == config.steps
            diverged = not finite and has_diverged(state, values, last)
            stop = world.largest(signals[0] if signals else 0)  # a signal to any process stops all, after this step
            bar.update()
            if last or diverged or state.step % config.log_every == 0:
                counters = {"lr": lr, "skipped_updates": state.skipped_steps, "seconds": state.seconds}
                if state.powersgd:
                    counters["bytes_between_machines"] = state.powersgd.sent
                record = meter.result() | counters
                log.write(state.step, record | state.incidents.result())
                if state.scales:
                    log.write(state.step, state.scales.record())
                bar.set_postfix(loss=record.get("loss"))
                metrics |= record
            if diverged:
                raise give_up(state, config, writer, f"a finite gradient, got none in {state.skipped_in_a_row} steps")
            if last or state.step % config.val_every == 0:
                with state.average.in_model() as model:
                    record = validate(task, model, device, world)
                log.write(state.step, record)
                metrics |= record
                if last and not math.isfinite(record.get("val_loss", 0.0)):
                    raise give_up(state, config, writer, f"a finite loss on held-out data, got {record['val_loss']}")
            if (last or stop) and not is_finite(state):
                raise give_up(state, config, writer, "finite parameters, got Inf or NaN in them")
            if last or (stop and finite):
                with state.average.in_model() as model:
                    export(model, exported, world)
            # While steps are skipped nothing is learnt, and the state may be past help: it replaces no good checkpoint.
            save_is_due |= state.step % config.save_every == 0
            if last or stop or (save_is_due and finite):
                run = {"fingerprint": fingerprint, "random": random_state(device), **state.values()}
                writer.save(state.step, state.tensors(), run, keep_all=not finite)
                task.report_skipped(folder / "skipped.jsonl")
                save_is_due = False
            if last or stop:
                writer.wait()
            if stop:
                raise TrainingStopped(stop, state.step)
    state.average.swap()  # not swapped back
    model = state.model.eval().requires_grad_(False)
    metrics = metrics or {**validate(task, model, device, world), "seconds": state.seconds}
    return gather_model(model, world) if world.size > 1 else model.cpu(), metrics


def has_diverged(state: State[Model], values: Metrics, last: bool) -> bool:
    """True if the steps just skipped mean that the training is lost: too many in a row, or the last one of all.

    Scales that are too large come down in time, as long as the loss is finite; then only a run of nothing but skipped
    steps ends as diverged.
    """
    if state.scales and bool(values["loss"].isfinite()):
        return state.skipped_in_a_row >= state.scales.patience or (last and state.skipped_in_a_row == state.step)
    return last or state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW


def is_finite(state: State[Model]) -> bool:
    """True if all parameters and their averages are."""
    tensors = (*state.parameters, *state.average.tensors().values())
    finite = all(bool(local(tensor.detach()).isfinite().all()) for tensor in tensors)
    return not state.world.largest(int(not finite))


def give_up(state: State[Model], config: TrainConfig, writer: CheckpointWriter, expected: str) -> TrainingDiverged:
    """The error of a training that has diverged; sets aside the checkpoints of the state that it diverged from."""
    good = state.step - state.skipped_in_a_row
    state.world.ask_first(lambda: writer.set_aside(good))
    return TrainingDiverged(
        f"training: expected {expected}; the last good step is {good}. Use a smaller lr, now {config.lr:g}, more "
        f"warmup_steps, now {config.warmup_steps}, or clip_norm, now {config.clip_norm:g}. The next run goes on from "
        "the newest checkpoint before that step, or starts anew"
    )


def train_step(
    state: State[Model], task: Task[Model], batch: Batch, lr: float, config: TrainConfig
) -> tuple[bool, Metrics]:
    """One step of the parameters and their average; returns whether it was made, and the metrics of the batch.

    Without a finite loss and gradient nothing changes: a skipped step does less harm than a NaN. The scales may confine
    the skip to a resblock.
    """
    loss, metrics = add_gradients(state, task, batch, config.accumulate)
    if state.powersgd:
        state.powersgd.finish()
    factors = state.scales.factors() if state.scales else None
    norm, nonfinite = gradient_norm(shards_of_gradients(state, factors), factors)
    loss, norm, nonfinite = of_all_processes(state, loss, norm, nonfinite)
    skip = state.scales.skip(nonfinite) if state.scales else nonfinite.any().expand_as(nonfinite)
    # All that the host must know, in one wait for the device.
    made, all_finite, value = torch.stack([loss.isfinite() & ~skip.all(), ~nonfinite.any(), loss]).tolist()
    finite = bool(made)
    if not all_finite:
        bad = zip(state.places, nonfinite.tolist(), strict=True)
        state.incidents.add_nonfinite(place for place, is_bad in bad if is_bad)
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
    return finite, {"loss": loss, "grad_norm": norm, **metrics}


def add_gradients(state: State[Model], task: Task[Model], batch: Batch, parts: int) -> tuple[torch.Tensor, Metrics]:
    """Add the gradients of a batch, part by part; returns its loss and metrics.

    A part is the batch of fewer samples, with its number as ``part`` unless it is the first.
    """
    if parts == 1:
        loss, metrics = task.loss(state.model, batch, state.step)
        backward(loss, state.model, state.world)
        return loss.detach(), metrics
    losses: list[torch.Tensor] = []
    found: list[Metrics] = []
    for number, part in enumerate(split(batch, parts)):
        loss, metrics = task.loss(state.model, part, state.step)
        backward(loss / parts, state.model, state.world, last=number == parts - 1)
        losses.append(loss.detach())
        found.append({name: value.detach() for name, value in metrics.items()})
    values = {name: torch.stack([metrics[name] for metrics in found]) for name in found[0]}
    summed = {name: value.mean(0) if value.ndim == 1 else value.sum(0) for name, value in values.items()}
    return torch.stack(losses).mean(), summed  # vectors are counts, which are summed as in Meter


def split(batch: Batch, parts: int) -> Iterator[Batch]:
    """Split a batch into parts of as many samples.

    Raises:
        ValueError: the samples of this process cannot be shared equally.
    """
    samples = len(next(iter(batch.values())))
    if samples % parts:
        raise ValueError(f"accumulate: expected a divisor of the {samples} samples of each process, got {parts}")
    size = samples // parts
    for number in range(parts):
        part = {name: values[number * size :][:size] for name, values in batch.items()}
        yield {**part, "part": number} if number else part


def shards_of_gradients(state: State[Model], factors: torch.Tensor | None) -> list[torch.Tensor]:
    """This process's shards of the gradients, or tensors of the same norms, in the order of the parameters."""
    shards = [counted_here(cast(torch.Tensor, p.grad), state.world) for p in state.parameters]
    if state.powersgd is None:
        return shards
    # PowerSGD knows the unscaled norms of its matrices, which need not be read again.
    squares = state.powersgd.squared_norms()
    scales = torch.ones(len(shards)) if factors is None else 1 / factors
    return [
        squares[name].sqrt().float() * scale if name in squares else shard
        for name, shard, scale in zip(state.names, shards, scales, strict=True)
    ]


def of_all_processes(
    state: State[Model], loss: torch.Tensor, norm: torch.Tensor, nonfinite: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean loss, the norm of all shards, and which parameters have a shard that is not finite; in one message.

    The scales' ``nonfinite`` are combined, too, so that all processes decide alike.
    """
    if state.world.size == 1:
        return loss, norm, nonfinite
    squares = norm.double().square() / state.world.copies  # number of times that each shard exists
    blocks = state.scales.nonfinite if state.scales else nonfinite.new_empty(0)
    loss, squares, nonfinite, found = state.world.sum([loss / state.world.size, squares, nonfinite, blocks])
    blocks.copy_(found > 0)
    return loss.float(), squares.sqrt().float(), nonfinite > 0


@torch.no_grad()
def validate(task: Task[Model], model: Model, device: torch.device, world: World) -> dict[str, float]:
    """Metrics over the held-out data as ``val_...``; empty if there is none.

    The processes take turns. One that is left without a batch must still compute, as the others need its shard.
    """
    meter, batches = Meter(world), iter(task.validation())
    while turn := list(islice(batches, world.size)):
        batch, size = turn[min(world.rank, len(turn) - 1)]
        meter.add(task.evaluate(model, to_device(batch, device)), size if world.rank < len(turn) else 0)
    return {f"val_{name}": value for name, value in meter.result().items()}


def export(model: Model, path: Path, world: World) -> None:
    """Write the model to a file."""
    whole = gather_model(model, world) if world.size > 1 else model
    if world.is_first:
        save_model(whole, path)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def fingerprint_of(task: Task[Model], config: TrainConfig) -> dict[str, Any]:
    """Values in which a checkpoint must agree with the run that resumes it: model, moments, data and trained parts."""
    sizes = json.loads(json.dumps(asdict(task.model.cfg)))  # tuples become lists, as they are read back
    moments = [group["moments"] for group in parameter_groups(task.model, config)]
    run = {"kind": task.kind, CORPUS: task.corpus, "seed": config.seed, "batch_size": config.batch_size}
    parts = {TRAINED_WITH + part: value for part, value in cast(Any, task.model).trained_with.items()}
    return {**run, "moments": moments, **parts, **sizes}


def keep_freed_memory() -> bool:
    """Have the C library reuse freed memory instead of returning it to the system; returns whether that was possible.

    Large tensors are otherwise mapped anew in every step, and touching new pages takes about a third of a step of a
    small model on a CPU. Only glibc can do this; elsewhere nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(what, 2**30) for what in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
