"""Image-caption pairs by index, whatever they are stored in."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np


class Pair(NamedTuple):
    """An image, uint8 [H, W, 3], and its caption."""

    image: np.ndarray
    caption: str


class Skipped(NamedTuple):
    """A sample, or a whole file of samples, that cannot be used."""

    name: str
    reason: str


class BrokenSample(Exception):
    """A sample that was there when its source was opened cannot be read."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Pairs(Protocol):
    """What :func:`open_pairs` returns. Reading a pair may raise :class:`BrokenSample`."""

    @property
    def skipped(self) -> Collection[Skipped]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...

    def captions(self) -> Iterator[str]:
        """All captions in order, without reading an image."""

    def caption(self, index: int) -> str:
        """The caption of a pair, without reading its image. May raise BrokenSample, as may the next two."""

    def name(self, index: int) -> str:
        """What reports call a pair."""

    def image_size(self, index: int) -> tuple[int, int]:
        """Width and height of an image as its header states them, without decoding it."""


def open_pairs(source: str | Path, workers: int | None = None) -> Pairs:
    """Open a source of image-caption pairs.

    Args:
        source: one of

            - ``"scenes"`` or ``"scenes:held-out"``: drawn scenes, see :mod:`dalle_fast.data.scenes`;
            - a folder of images, each with a ``.txt`` of the same stem beside it, searched recursively;
            - a ``.csv`` or ``.jsonl`` manifest with ``image`` (relative to the manifest) and ``caption``;
            - a ``.tar`` in WebDataset naming, a folder of them, or a glob such as ``"shards/*.tar"``; they are indexed
              on the first time, see :mod:`dalle_fast.data.index`;
            - a view of another source, see :mod:`dalle_fast.data.views`.
        workers: processes that index tar shards; None is one for each processor.

    Samples that cannot be used are named in ``skipped``. A caption is stripped of the white space around it.

    Raises:
        ValueError: there is no such source, or it holds no pair at all.
    """
    from . import scenes, shards, sources, views  # here, because they are written in terms of this module

    drawn: dict[str, Callable[[], Pairs]] = {
        "scenes": scenes.SceneCorpus,
        "scenes:held-out": lambda: scenes.SceneCorpus(held_out=True),
    }
    if str(source) in drawn:
        return drawn[str(source)]()
    path = Path(source)
    pairs: Pairs
    if (path / views.VIEW).is_file():
        return views.open_view(path, workers)
    if tars := find_shards(source):
        pairs = shards.ShardPairs(tars, workers)
    elif path.is_dir():
        pairs = sources.index_folder(path)
    elif path.is_file() and path.suffix.lower() in (".csv", ".jsonl"):
        pairs = sources.index_manifest(path)
    else:
        problem = "a file of another kind" if path.exists() else "nothing there"
        raise ValueError(f"source: expected a folder, .csv, .jsonl, .tar or 'scenes', got {source} ({problem})")
    if not len(pairs):
        first = next(iter(pairs.skipped), None)
        reason = f", the first {first.name}: {first.reason}" if first else ""
        raise ValueError(
            f"source: expected image-caption pairs, got none in {source} ({len(pairs.skipped)} skipped{reason})"
        )
    return pairs


def find_shards(source: str | Path) -> list[Path]:
    """The tar shards that a source names, in order: one, those of a folder, or those that match a glob."""
    path = Path(source)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.is_file():
        return [path] if path.suffix.lower() == ".tar" else []
    return [Path(name) for name in sorted(glob.glob(os.fspath(source)))] if glob.has_magic(str(source)) else []
