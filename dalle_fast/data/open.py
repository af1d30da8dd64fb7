"""From the name of a source to its pairs."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from .pairs import Pairs
from .sources.files import index_folder, index_manifest
from .sources.scenes import SceneCorpus
from .sources.tar import ShardPairs
from .sources.view import VIEW, View, fingerprint_of, read_view


def open_pairs(source: str | Path, workers: int | None = None) -> Pairs:
    """Open a source of image-caption pairs.

    Args:
        source: one of

            - ``"scenes"`` or ``"scenes:held-out"``: synthetic scenes, see :mod:`dalle_fast.data.sources.scenes`;
            - a folder of images, each with a ``.txt`` of the same stem beside it, searched recursively;
            - a ``.csv`` or ``.jsonl`` manifest with ``image`` (relative to the manifest) and ``caption``;
            - a ``.tar`` in WebDataset naming, a folder of them, or a glob such as ``"shards/*.tar"``; they are indexed
              when they are first opened, see :mod:`dalle_fast.data.sources.tar_index`;
            - a view of another source, see :mod:`dalle_fast.data.sources.view`.
        workers: processes that index tar shards; None is one per processor.

    Samples that cannot be used are named in ``skipped``. A caption is stripped of the white space around it.

    Raises:
        ValueError: there is no such source, or it holds no pair at all.
    """
    if str(source) in ("scenes", "scenes:held-out"):
        return SceneCorpus(held_out=str(source) == "scenes:held-out")
    path = Path(source)
    pairs: Pairs
    if (path / VIEW).is_file():
        return open_view(path, workers)
    if tars := find_shards(source):
        pairs = ShardPairs(tars, workers)
    elif path.is_dir():
        pairs = index_folder(path)
    elif path.is_file() and path.suffix.lower() in (".csv", ".jsonl"):
        pairs = index_manifest(path)
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


def open_view(folder: Path, workers: int | None = None) -> View:
    """Open a view and its source, the latter as ``open_pairs`` does.

    Raises:
        ValueError: the folder is no intact view, or its source cannot be opened or has changed.
    """
    source, fingerprint = read_view(folder)
    pairs = open_pairs(source, workers)
    if fingerprint_of(pairs) != fingerprint:
        raise ValueError(f"view: expected the pairs that {folder} was made of, got others in {source}")
    return View(pairs, folder)


def find_shards(source: str | Path) -> list[Path]:
    """The tar shards of a source, in order: a single one, those of a folder, or those that match a glob."""
    path = Path(source)
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    if path.is_file():
        return [path] if path.suffix.lower() == ".tar" else []
    return [Path(name) for name in sorted(glob.glob(os.fspath(source)))] if glob.has_magic(str(source)) else []
