"""Averages of metrics, incidents, and the log file of a run."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from ..distributed.world import ALONE, World
from ..files import read_records, write_atomically

Metrics = dict[str, torch.Tensor]


class Meter:
    """Averages over batches and processes: scalars are averaged, vectors [K] are counts of codes and are summed."""

    def __init__(self, world: World = ALONE) -> None:
        self._world = world
        self._sums: Metrics = {}
        self._weight = 0

    def add(self, metrics: Metrics, weight: int = 1) -> None:
        """Add the metrics of a batch; with weight 0 only their names, which must be the same in all processes."""
        for name, value in metrics.items():
            value = value.detach() * (weight if value.ndim == 0 else weight > 0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._weight += weight

    def result(self) -> dict[str, float]:
        """The averages; counts become ``codes_used`` (codes seen at all) and ``code_perplexity``. Resets."""
        result: dict[str, float] = {}
        *sums, weight = self._world.sum([*self._sums.values(), torch.tensor(float(self._weight))])
        for name, value in zip(self._sums, sums, strict=True):
            if value.ndim == 0:
                result[name] = value.item() / weight.item()
            else:
                result["codes_used"] = int((value > 0).sum())
                result["code_perplexity"] = perplexity(value)
        self._sums, self._weight = {}, 0
        return result


def perplexity(counts: torch.Tensor) -> float:
    """Number of equally used codes with the entropy of these counts [K]: from 1, collapsed, to K."""
    p = counts.double() / counts.sum()
    return torch.special.entr(p).sum().exp().item()


@dataclass
class LossSpikes:
    """Detects spikes: losses more than 6 standard deviations above the running mean. Its fields are its state.

    Mean and variance weigh about the last 100 losses; the first 100 are no spikes.
    """

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def update(self, loss: float) -> bool:
        """Add the finite loss of one step; returns whether it is a spike."""
        spike = self.count >= 100 and loss > self.mean + 6 * math.sqrt(self.variance)
        self.count += 1
        share, gap = max(1 / self.count, 0.01), loss - self.mean
        self.mean += share * gap
        self.variance = (1 - share) * (self.variance + share * gap**2)
        return spike


class Incidents:
    """Spikes and gradients that were not finite since the last log record."""

    def __init__(self) -> None:
        self._spikes: list[int] = []
        self._nonfinite: Counter[str] = Counter()

    def add_spike(self, step: int) -> None:
        self._spikes.append(step)

    def add_nonfinite(self, places: Iterable[str]) -> None:
        """Count a step in which gradients in these places of the model were not finite; repeated places count once."""
        self._nonfinite.update(set(places))

    def result(self) -> dict[str, Any]:
        """``loss_spikes``, their steps, and ``nonfinite``, the number of steps per place; neither if empty. Resets."""
        found: dict[str, Any] = {"loss_spikes": self._spikes, "nonfinite": dict(sorted(self._nonfinite.items()))}
        self._spikes, self._nonfinite = [], Counter()
        return {name: value for name, value in found.items() if value}


class Log:
    """A JSONL file, one record per line, and optionally TensorBoard beside it.

    Args:
        path: continued if it exists; records of steps after ``step`` are dropped, as a resumed run writes them again.
            None writes nothing, for all processes but the first.
        step: finished steps at the start of the run.
        tensorboard: also write event files to the folder ``tensorboard`` beside the file.
    """

    def __init__(self, path: Path | None, step: int, tensorboard: bool = False) -> None:
        self._writer: Any = None
        self._file: IO[str] | None = None
        if path is None:
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "tensorboard: expected the package, got none; try: pip install tensorboard"
                ) from error
            self._writer = SummaryWriter(path.parent / "tensorboard", purge_step=step + 1)
        records = read_records(path) if path.exists() and step else []
        kept = [json.dumps(record) for record in records if record["step"] <= step]
        write_atomically(path, "".join(line + "\n" for line in kept), durable=False)  # a kill here keeps the log
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Append a record, unless it is empty; numbers that are not finite become null, as JSON cannot hold them.

        Lists and dicts, whose numbers must be finite, go to the JSONL file alone.
        """
        if not record or self._file is None:
            return
        numbers = {name: value for name, value in record.items() if not isinstance(value, (list, dict))}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step, **record, **finite}) + "\n")
        self._file.flush()
        if self._writer:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file:
            self._file.close()
        if self._writer:
            self._writer.close()
