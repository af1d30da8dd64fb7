"""Near-duplicate images (appendix C of the paper): images whose embeddings by a contrastive model are close.

Greedy, in the order of the source: an image is dropped when its cosine with a kept image, earlier in that order,
reaches a threshold. So the order determines the result, no two kept images are near-duplicates, and each dropped image
is close to a kept one. (Connected components would also drop images that are alike only through a chain.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ..files import check_new
from .augment import center_crop_resize
from .pairs import Pairs
from .shard_job import (
    DEFAULTS,
    SETTINGS,
    JobOptions,
    JobSettings,
    Shard,
    process_in_shards,
    read_settings,
    read_skipped,
    shard_folders,
)
from .sources.view import Dropped, fingerprint_of, write_view

EXACT_UP_TO = 1_000_000  # pairs; beyond, an approximate index finds the nearest image
BLOCK_SIZE = 4_096  # embeddings compared at once
_EMBEDDINGS, _ROWS = "embeddings.npy", "rows.npy"


class Duplicate(NamedTuple):
    """A duplicate, and the image kept in its place."""

    row: int
    of: int
    cosine: float


class Neighbours(Protocol):
    """The embeddings of the kept images, searchable."""

    def __len__(self) -> int: ...

    def add(self, rows: np.ndarray, vectors: torch.Tensor) -> None:
        """Keep rows [n] and their unit vectors [n, D]."""

    def nearest(self, vectors: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """For unit vectors [n, D]: the rows of the nearest kept ones, int64 [n], and their cosines, float32 [n]."""


@dataclass(frozen=True, kw_only=True)
class Embedding(JobSettings):
    """All that decides the embeddings, beside the pairs; of each image the central square is embedded."""

    shard_size: int = 65_536  # images


def embed_pairs(
    folder: str | Path,
    pairs: Pairs,
    embed: Callable[[torch.Tensor], torch.Tensor],
    embedding: Embedding,
    options: JobOptions = DEFAULTS,
) -> bool:
    """Write the embeddings of all images as float16, in shards; a run that was killed goes on at the first missing one.

    Args:
        folder: a new one, or that of the same work.
        embed: float images [B, 3, S, S] in [0, 1] to unit vectors [B, D].

    Returns:
        True if all are there; else other processes are still at work.

    Raises:
        ValueError: the folder holds something else, or work with other settings.
    """

    def save(folder: Path, shard: Shard) -> None:
        np.save(folder / _ROWS, shard.rows)
        np.save(folder / _EMBEDDINGS, shard.values.reshape(len(shard.rows), -1).astype(np.float16))

    prepare = partial(_central, size=embedding.image_size)
    return process_in_shards(folder, pairs, embedding, prepare, embed, save, options=options)


def _central(image: np.ndarray, _: int, size: int) -> np.ndarray:
    return center_crop_resize(image, size)[None]


def read_embeddings(folder: str | Path) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """The output of :func:`embed_pairs`, shard by shard: rows, int64 [n], and unit vectors, float32 [n, D]."""
    for path in shard_folders(Path(folder)):
        vectors = torch.from_numpy(np.load(path / _EMBEDDINGS)).float()
        if len(vectors):  # else all of its images are broken
            yield np.load(path / _ROWS), F.normalize(vectors, dim=-1)


def find_duplicates(
    embeddings: Iterable[tuple[np.ndarray, torch.Tensor]],
    threshold: float,
    kept: Neighbours,
    block_size: int = BLOCK_SIZE,
) -> Iterator[Duplicate]:
    """The near-duplicates among embeddings that come in order, in blocks of rows [n] and unit vectors [n, D].

    Args:
        threshold: the least cosine of near-duplicates.
        kept: empty; takes in the embeddings of the images kept.
        block_size: embeddings compared at once.
    """
    for shard_rows, shard_vectors in embeddings:
        for start in range(0, len(shard_rows), block_size):
            rows, vectors = shard_rows[start : start + block_size], shard_vectors[start : start + block_size]
            if len(kept):
                of, cosine = kept.nearest(vectors)
            else:
                of, cosine = np.zeros(len(rows), np.int64), np.full(len(rows), -1, np.float32)
            stays = cosine < threshold
            within = (vectors @ vectors.T).tril(-1).numpy()
            for row in np.flatnonzero(stays & (within.max(1) >= threshold)):
                alike = np.where(stays[:row], within[row, :row], 0)
                best = int(alike.argmax())
                if alike[best] >= threshold:
                    of[row], cosine[row], stays[row] = rows[best], alike[best], False
            kept.add(rows[stays], vectors[torch.from_numpy(stays)])
            for row in np.flatnonzero(~stays):
                yield Duplicate(int(rows[row]), int(of[row]), float(cosine[row]))


class ExactNeighbours:
    """Compares with all of up to ``capacity`` vectors, in float32, ``block_size`` at once."""

    def __init__(self, capacity: int, device: str = "cpu", block_size: int = BLOCK_SIZE) -> None:
        self._block_size = block_size
        self._rows = np.empty(capacity, np.int64)
        self._vectors = torch.empty(0, device=device)  # room for all, once their length is known
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, rows: np.ndarray, vectors: torch.Tensor) -> None:
        if not len(self._vectors):
            self._vectors = self._vectors.new_empty(len(self._rows), vectors.shape[1])
        end = self._count + len(rows)
        self._rows[self._count : end], self._vectors[self._count : end] = rows, vectors
        self._count = end

    def nearest(self, vectors: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        vectors = vectors.to(self._vectors.device)
        place = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
        best = torch.full((len(vectors),), -torch.inf, device=vectors.device)
        for start in range(0, self._count, self._block_size):
            cosine, where = (vectors @ self._vectors[start : min(start + self._block_size, self._count)].T).max(1)
            place = torch.where(cosine > best, where + start, place)
            best = torch.maximum(best, cosine)
        return self._rows[place.cpu().numpy()], best.cpu().numpy()


class ApproximateNeighbours:
    """Searches a graph of neighbours in float16 (usearch): misses a few, but is fast among any number."""

    def __init__(self) -> None:
        try:
            from usearch.index import Index
        except ImportError:
            raise ImportError(
                "usearch: expected the package that compares so many images, got none; try: pip install usearch"
            ) from None
        self._new_index = Index
        self._index: Any = ()  # empty, until the length of vectors is known

    def __len__(self) -> int:
        return len(self._index)

    def add(self, rows: np.ndarray, vectors: torch.Tensor) -> None:
        if not len(self):
            self._index = self._new_index(ndim=vectors.shape[1], metric="ip", dtype="f16")
        self._index.add(rows, vectors.numpy())

    def nearest(self, vectors: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        matches = self._index.search(vectors.numpy(), 1)
        return matches.keys.reshape(-1).astype(np.int64), np.minimum(1 - matches.distances.reshape(-1), 1)


def drop_duplicates(
    folder: str | Path,
    source: str | Path,
    pairs: Pairs,
    embeddings: str | Path,
    threshold: float,
    exact_up_to: int = EXACT_UP_TO,
    device: str = "cpu",
) -> dict[str, int]:
    """Write a view of the pairs whose images are no near-duplicates, given their embeddings.

    Memory: 13 bytes per pair, and the embeddings of the images kept; in float32 up to ``exact_up_to`` pairs, else in
    float16 with the graph.

    Args:
        folder: a new one, for the view and its report, which names the kept image for each duplicate.
        source: the name that ``open_pairs`` opened as ``pairs``.
        embeddings: the folder that ``embed_pairs`` filled.
        threshold: the least cosine of near-duplicates, above 0 and up to 1.
        exact_up_to: pairs; for more than these an approximate index is used.
        device: of the exact comparison.

    Returns:
        the number of pairs dropped as ``near-duplicate`` and as ``broken image``.

    Raises:
        ValueError: the folder is not new, or the embeddings are not complete or of other pairs.
        ImportError: usearch is needed and missing.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a cosine above 0 and up to 1, got {threshold}")
    check_new(folder)
    embeddings = Path(embeddings)
    if not (embeddings / SETTINGS).is_file() or not all(path.is_dir() for path in shard_folders(embeddings)):
        raise ValueError(f"embeddings: expected those of {len(pairs)} images, got none or a part in {embeddings}")
    if read_settings(embeddings)["source"] != fingerprint_of(pairs):
        raise ValueError(f"embeddings: expected those of {source}, got those of another source in {embeddings}")
    broken = np.ones(len(pairs), bool)
    for path in shard_folders(embeddings):
        broken[np.load(path / _ROWS)] = False
    if broken.all():
        raise ValueError(f"pairs: expected at least one readable image, got none of {len(pairs)}")
    exact = len(pairs) <= exact_up_to
    kept: Neighbours = ExactNeighbours(len(pairs), device) if exact else ApproximateNeighbours()
    of, cosine = np.full(len(pairs), -1, np.int64), np.zeros(len(pairs), np.float32)
    for row, other, similarity in find_duplicates(read_embeddings(embeddings), threshold, kept):
        of[row], cosine[row] = other, similarity

    def dropped() -> Iterator[Dropped]:
        unreadable = read_skipped(embeddings)
        for index in np.flatnonzero(broken | (of >= 0)).tolist():
            if broken[index]:
                yield Dropped(index, "broken image", {"error": next(unreadable).reason})
            else:
                details = {
                    "of": int(of[index]),
                    "of_name": pairs.name(of[index]),
                    "cosine": round(float(cosine[index]), 4),
                }
                yield Dropped(index, "near-duplicate", details)

    settings = {"threshold": threshold, "exact": exact, "embeddings": str(embeddings.absolute())}
    return write_view(folder, source, pairs, dropped(), {"dedup": settings})
