"""Batches by step number: nothing to save, nothing to restore.

A batch is a function of (seed, step) alone. Sample number ``n`` is the ``n mod N``-th pair of epoch ``n div N``, whose
order is a keyed permutation of the N pairs, and its random choices come from a generator of (seed, n). So a run resumed
at step k sees the same samples as one that never stopped, for any number of workers and of ranks, which share a batch.
"""

from __future__ import annotations

import gc
import itertools
import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .pairs import BrokenSample, Skipped
from .shuffle import shuffled

Batch = dict[str, Any]
Transform = Callable[[Any, np.random.Generator], dict[str, Any]]

MAX_BROKEN_IN_A_ROW = 1000  # samples, after which the corpus is taken to be unreadable


class Corpus(Protocol):
    """Samples by index: ``Pairs``, ``EncodedPairs``, a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class EpochCorpus(Corpus, Protocol):
    """A corpus whose samples differ from epoch to epoch, such as images encoded in several augmentations."""

    def seen_in(self, epoch: int, index: int, /) -> Any: ...


def collate(samples: Sequence[dict[str, Any]]) -> Batch:
    """Samples to one batch, key by key.

    uint8 arrays [H, W, 3] are images and become float32 [B, 3, H, W] in [0, 1]; other arrays, tensors and numbers are
    stacked with their own type; anything else is kept as a list of B.
    """
    return {key: _stack([sample[key] for sample in samples]) for key in samples[0]}


def _stack(values: list[Any]) -> torch.Tensor | list[Any]:
    if isinstance(values[0], torch.Tensor):
        return torch.stack(values)
    if isinstance(values[0], (np.ndarray, np.generic, int, float)):
        stacked = torch.from_numpy(np.stack(values))
        if stacked.dtype == torch.uint8 and stacked.ndim == 4:
            return stacked.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255
        return stacked
    return values


class Batches:
    """An endless, shuffled stream of batches over the epochs of a corpus: all of each batch, or the share of one rank.

    Args:
        pairs: the corpus. A sample that raises :class:`BrokenSample`, here or in ``transform``, is replaced by one at
            random.
        batch_size: samples per batch, over all ranks. Batches run across the ends of epochs, so none is cut short.
        transform: ``(pair, rng) -> dict``; makes a sample of a pair, with all randomness from ``rng``.
        seed: 0 or more.
        workers: processes of :meth:`iterate` that prepare batches ahead; 0 prepares them in the loop.
        rank: number of this process, which gets one of ``ranks`` contiguous parts of each batch.
        ranks: processes that train together; a divisor of the batch size.

    ``skipped`` counts the samples left out so far.
    """

    def __init__(
        self,
        pairs: Corpus,
        batch_size: int,
        transform: Transform,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if len(pairs) < 1:
            raise ValueError("pairs: expected at least one pair, got none")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        if seed < 0 or workers < 0:
            raise ValueError(f"seed and workers: expected 0 or more, got {seed} and {workers}")
        if ranks < 1 or batch_size % ranks:
            raise ValueError(f"batch_size: expected a multiple of the {ranks} ranks, got {batch_size}")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank: expected 0 to {ranks - 1}, got {rank}")
        self.pairs = pairs
        self._by_epoch = pairs if isinstance(pairs, EpochCorpus) else None
        self.batch_size = batch_size
        self.transform = transform
        self.seed = seed
        self.workers = workers
        self.rank = rank
        self.ranks = ranks
        self.skipped: Counter[Skipped] = Counter()
        self._reported: Counter[Skipped] = Counter()  # by the run that this one resumes

    def batch_at(self, step: int) -> Batch:
        """The batch of one step, as :func:`collate` makes it."""
        batch, skipped = self._load(step)
        self.skipped.update(skipped)
        return batch

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from ``start_step`` on, without end, the same as those of ``batch_at``."""
        steps = range(start_step, sys.maxsize)
        if self.workers == 0:
            yield from map(self.batch_at, steps)
            return
        loader = DataLoader(
            _Steps(self),
            batch_size=None,
            sampler=steps,
            num_workers=self.workers,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # else the loader would draw from torch's global one
        )
        for batch, skipped in loader:
            self.skipped.update(skipped)
            yield batch

    def continue_report(self, path: str | Path) -> None:
        """Go on with the counts that ``write_report`` has written, of a run that is resumed."""
        at_opening = set(getattr(self.pairs, "skipped", ()))
        text = Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).is_file() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                skipped, count = Skipped(entry["name"], entry["reason"]), entry["count"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # damaged
            if type(skipped.name) is type(skipped.reason) is str and type(count) is int and skipped not in at_opening:
                self._reported[skipped] += count

    def write_report(self, path: str | Path, others: Iterable[Counter[Skipped]] = ()) -> None:
        """Write the samples left out as JSON lines: name, reason and count.

        First those that the corpus skipped when it was opened, then those that could not be read by this process, or by
        other ranks, whose counts are ``others``.
        """
        unreadable = sum(others, self._reported + self.skipped)
        with open(path, "w", encoding="utf-8") as file:
            at_opening = ((skipped, 1) for skipped in getattr(self.pairs, "skipped", ()))
            for (name, reason), count in itertools.chain(at_opening, sorted(unreadable.items())):
                file.write(json.dumps({"name": name, "reason": reason, "count": count}) + "\n")

    def _load(self, step: int) -> tuple[Batch, list[Skipped]]:
        """This rank's part of a batch, and the broken samples that were replaced."""
        if step < 0:
            raise ValueError(f"step: expected 0 or more, got {step}")
        share = self.batch_size // self.ranks
        first = step * self.batch_size + self.rank * share
        skipped: list[Skipped] = []
        samples = [
            self._sample(number, index, skipped)
            for number, index in enumerate(indices_of(first, share, len(self.pairs), self.seed), start=first)
        ]
        return collate(samples), skipped

    def _sample(self, number: int, index: int, skipped: list[Skipped]) -> dict[str, Any]:
        """Sample ``number``: of pair ``index``, or of another one if that is broken."""
        rng, epoch = np.random.default_rng((self.seed, number)), number // len(self.pairs)
        for _ in range(MAX_BROKEN_IN_A_ROW):
            try:
                pair = self._by_epoch.seen_in(epoch, index) if self._by_epoch else self.pairs[index]
                return self.transform(pair, rng)
            except BrokenSample as error:
                skipped.append(Skipped(error.name, error.reason))
                index = int(rng.integers(len(self.pairs)))
        last = f"{skipped[-1].name}: {skipped[-1].reason}"
        raise ValueError(f"pairs: expected readable ones, got {MAX_BROKEN_IN_A_ROW} broken in a row, the last {last}")


def start_worker(_worker: int) -> None:
    """Prepare a data worker, for DataLoader.

    A signal to the whole group of processes, as batch systems and terminals send it, is for the main process, which
    still needs batches to end well; the workers end with it. Objects from before the fork are exempt from garbage
    collection, which would touch and so copy them.
    """
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    gc.freeze()


def indices_of(first: int, count: int, n: int, seed: int) -> list[int]:
    """The indices, of ``n`` pairs, of the samples ``first`` to ``first + count - 1``."""
    epochs, positions = np.divmod(np.arange(first, first + count), n)
    parts = [shuffled(positions[epochs == epoch], n, seed, epoch) for epoch in range(epochs[0], epochs[-1] + 1)]
    return np.concatenate(parts).tolist()


class _Steps(Dataset[tuple[Batch, list[Skipped]]]):
    """Batches as a map from step to batch, for DataLoader workers."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __getitem__(self, step: int) -> tuple[Batch, list[Skipped]]:
        return self._batches._load(step)
