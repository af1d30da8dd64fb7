"""Batches by step number: nothing to save, nothing to restore.

What is in a batch follows from (seed, step) alone. Sample number ``n`` is the ``n mod N``-th pair of epoch ``n div N``,
whose order is a keyed permutation of the N pairs, and its random choices come from a generator of (seed, n). So a run
that goes on at step k sees what it would have seen, whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .pairs import BrokenSample, Skipped

Batch = dict[str, Any]
Transform = Callable[[Any, np.random.Generator], dict[str, Any]]

_ROUNDS = 6


class Corpus(Protocol):
    """Anything by index: ``Pairs``, ``EncodedPairs``, a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def shuffled(index: int, n: int, seed: int, epoch: int) -> int:
    """Where a permutation of ``range(n)``, another one for each (seed, epoch), sends ``index``.

    A Feistel network permutes the next larger 2^(2b); walking on until the result is below ``n`` (at most four steps
    on average) makes it a permutation of ``range(n)`` that takes no memory.
    """
    if not 0 <= index < n:
        raise ValueError(f"index: expected 0 to {n - 1}, got {index}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=16).digest()
    while True:
        left, right = index >> half, index & mask
        for i in range(_ROUNDS):
            digest = hashlib.blake2b(right.to_bytes(8, "little"), digest_size=8, key=key, salt=bytes([i])).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half | right
        if index < n:
            return index


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
    """An endless, shuffled stream of batches over the epochs of a corpus.

    Args:
        pairs: the corpus. A sample that raises :class:`BrokenSample`, here or in ``transform``, is left out.
        batch_size: samples per batch. Batches run across the ends of epochs, so none is cut short there.
        transform: ``(pair, rng) -> dict``; what to make of a pair, with all randomness from ``rng``.
        seed: 0 or more.
        workers: processes of :meth:`iterate` that prepare batches ahead; 0 does it in the loop.

    ``skipped`` counts what was left out, beginning with what the corpus skipped when it was opened.
    """

    def __init__(self, pairs: Corpus, batch_size: int, transform: Transform, seed: int, workers: int = 0) -> None:
        if len(pairs) < 1:
            raise ValueError("pairs: expected at least one pair, got none")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
        if seed < 0 or workers < 0:
            raise ValueError(f"seed and workers: expected 0 or more, got {seed} and {workers}")
        self.pairs = pairs
        self.batch_size = batch_size
        self.transform = transform
        self.seed = seed
        self.workers = workers
        self.skipped: Counter[Skipped] = Counter(getattr(pairs, "skipped", ()))

    def batch_at(self, step: int) -> Batch:
        """The batch of one step; see :func:`collate` for what it holds."""
        batch, skipped = self._load(step)
        self.skipped.update(skipped)
        return batch

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from ``start_step`` on, without end, the same as ``batch_at`` gives."""
        steps = range(start_step, sys.maxsize)
        if self.workers == 0:
            yield from map(self.batch_at, steps)
            return
        loader = DataLoader(
            _Steps(self),
            batch_size=None,
            sampler=steps,
            num_workers=self.workers,
            generator=torch.Generator(),  # else the loader would draw from torch's global one
        )
        for batch, skipped in loader:
            self.skipped.update(skipped)
            yield batch

    def write_report(self, path: str | Path) -> None:
        """Write what was left out as JSON lines: name, reason and count."""
        with open(path, "w", encoding="utf-8") as file:
            for (name, reason), count in sorted(self.skipped.items()):
                file.write(json.dumps({"name": name, "reason": reason, "count": count}) + "\n")

    def _load(self, step: int) -> tuple[Batch, list[Skipped]]:
        """A batch and what is missing from it.

        Where a whole batch is broken the next step's stands in, so that a step always has a batch and a number.
        """
        if step < 0:
            raise ValueError(f"step: expected 0 or more, got {step}")
        skipped: list[Skipped] = []
        for stand_in in range(step, step + len(self.pairs) // self.batch_size + 2):  # an epoch's worth of attempts
            samples = []
            for number in range(stand_in * self.batch_size, (stand_in + 1) * self.batch_size):
                epoch, index = divmod(number, len(self.pairs))
                try:
                    pair = self.pairs[shuffled(index, len(self.pairs), self.seed, epoch)]
                    samples.append(self.transform(pair, np.random.default_rng((self.seed, number))))
                except BrokenSample as error:
                    skipped.append(Skipped(error.name, error.reason))
            if samples:
                return collate(samples), skipped
        raise ValueError(f"pairs: expected at least one readable sample, got none; the last {skipped[-1]}")


class _Steps(Dataset[tuple[Batch, list[Skipped]]]):
    """Batches as the map from step to batch that DataLoader workers read."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __getitem__(self, step: int) -> tuple[Batch, list[Skipped]]:
        return self._batches._load(step)
