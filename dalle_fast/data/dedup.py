"""Near-duplicate images (appendix C of the paper): images whose embeddings by a contrastive model are close.

Greedy, in the order of the source: an image is dropped when its cosine with a kept image, earlier in that order,
reaches a threshold. So the order determines the result, no two kept images are near-duplicates, and each dropped image
is close to a kept one. (Connected components would also drop images that are alike only through a chain.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from ..files import check_new, crc_of
from .augment import center_crop_resize
from .pairs import Pairs, Skipped
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
_CHECKSUMS = "checksums.json"  # of both, by name


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
        # one shape for a shard of broken images, too: -1 cannot be told for none
        vectors = shard.values.reshape(len(shard.rows), -1) if len(shard.rows) else np.empty((0, 0))
        np.save(folder / _EMBEDDINGS, vectors.astype(np.float16))
        checksums = {name: crc_of(folder / name) for name in (_ROWS, _EMBEDDINGS)}
        (folder / _CHECKSUMS).write_text(json.dumps(checksums) + "\n", encoding="utf-8")

    prepare = partial(_central, size=embedding.image_size)
    return process_in_shards(folder, pairs, embedding, prepare, embed, save, options=options)


def _central(image: np.ndarray, _: int, size: int) -> np.ndarray:
    return center_crop_resize(image, size)[None]


def read_embeddings(folder: str | Path) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """The output of :func:`embed_pairs`, shard by shard: rows, int64 [n], and unit vectors, float32 [n, D].

    Raises:
        ValueError: a shard is damaged.
    """
    length: int | None = None  # of a vector
    for shard, rows, vectors in _read_shards(Path(folder)):
        if len(rows):  # else all of its images are broken
            length = length or vectors.shape[1]
            if vectors.shape[1] != length:
                raise _damaged(shard, f"vectors of length {vectors.shape[1]}, not {length}")
            yield rows, F.normalize(torch.from_numpy(vectors).float(), dim=-1)


def _read_shards(folder: Path) -> Iterator[tuple[Path, np.ndarray, np.ndarray]]:
    """Folder, rows and vectors of each shard. Raises ValueError if one is damaged."""
    settings = read_settings(folder)
    size = settings["shard_size"]
    for number, shard in enumerate(shard_folders(folder)):
        rows, vectors = _read_shard(shard)
        first, end = number * size, min((number + 1) * size, settings["pairs"])
        if len(rows) and not first <= rows[0] <= rows[-1] < end:
            raise _damaged(shard, f"rows {rows[0]} to {rows[-1]}, not among {first} to {end - 1}")
        yield shard, rows, vectors


def _read_shard(shard: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows, int64 [n], ascending, and vectors, float16 [n, D], of a shard. Raises ValueError if it is damaged."""
    try:
        checksums: dict[str, int] = {}  # shards of older versions have none
        if (shard / _CHECKSUMS).is_file():
            checksums = json.loads((shard / _CHECKSUMS).read_text(encoding="utf-8"))
            if not isinstance(checksums, dict) or set(checksums) != {_ROWS, _EMBEDDINGS}:
                raise ValueError(f"expected checksums of two files in {_CHECKSUMS}")
        for name, crc in checksums.items():
            if crc_of(shard / name) != crc:
                raise ValueError(f"expected {name} as it was written")
        rows, vectors = np.load(shard / _ROWS), np.load(shard / _EMBEDDINGS)
    except Exception as error:  # on damaged bytes numpy raises nearly anything
        raise _damaged(shard, f"{type(error).__name__}: {error}") from None
    if rows.dtype != np.int64 or rows.ndim != 1 or vectors.dtype != np.float16 or vectors.ndim != 2:
        raise _damaged(shard, f"arrays {rows.dtype} {[*rows.shape]} and {vectors.dtype} {[*vectors.shape]}")
    if len(rows) != len(vectors) or (np.diff(rows) <= 0).any():
        raise _damaged(shard, f"{len(rows)} rows for {len(vectors)} vectors, or rows that do not ascend")
    if not np.isfinite(vectors).all():
        raise _damaged(shard, "vectors that are not finite")
    return rows, vectors


def _damaged(shard: Path, problem: str) -> ValueError:
    return ValueError(
        f"embeddings: expected {shard} as it was written, got damage ({problem}); "
        "delete this folder and run again, which makes no other shard"
    )


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
    begun = (embeddings / SETTINGS).is_file()
    if begun:
        settings_of_source = read_settings(embeddings)
        if (settings_of_source.get("source"), settings_of_source["pairs"]) != (fingerprint_of(pairs), len(pairs)):
            raise ValueError(f"embeddings: expected those of {source}, got those of another source in {embeddings}")
    if not begun or not all(path.is_dir() for path in shard_folders(embeddings)):
        raise ValueError(f"embeddings: expected those of {len(pairs)} images, got none or a part in {embeddings}")
    broken = np.ones(len(pairs), bool)
    for _, rows, _ in _read_shards(embeddings):
        broken[rows] = False
    if broken.all():
        raise ValueError(f"pairs: expected at least one readable image, got none of {len(pairs)}")
    exact = len(pairs) <= exact_up_to
    kept: Neighbours = ExactNeighbours(len(pairs), device) if exact else ApproximateNeighbours()
    of, cosine = np.full(len(pairs), -1, np.int64), np.zeros(len(pairs), np.float32)
    for row, other, similarity in find_duplicates(read_embeddings(embeddings), threshold, kept):
        of[row], cosine[row] = other, similarity

    def dropped() -> Iterator[Dropped]:
        unreadable = read_skipped(embeddings)
        unnamed = Skipped("", "unknown")  # where a report is damaged
        for index in np.flatnonzero(broken | (of >= 0)).tolist():
            if broken[index]:
                yield Dropped(index, "broken image", {"error": next(unreadable, unnamed).reason})
            else:
                details = {
                    "of": int(of[index]),
                    "of_name": pairs.name(of[index]),
                    "cosine": round(float(cosine[index]), 4),
                }
                yield Dropped(index, "near-duplicate", details)

    settings = {"threshold": threshold, "exact": exact, "embeddings": str(embeddings.absolute())}
    return write_view(folder, source, pairs, dropped(), {"dedup": settings})
