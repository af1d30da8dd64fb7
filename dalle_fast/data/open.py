"""From the name of a source to its pairs."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from .pairs import Pairs
from .sources.files import TABLES, index_folder, index_manifest
from .sources.names import expand_braces, names_several, parts_of
from .sources.scenes import SceneCorpus
from .sources.tar import ShardPairs
from .sources.view import VIEW, View, fingerprint_of, read_view

MAX_VIEWS = 100  # each of the next


def open_pairs(source: str | Path, workers: int | None = None) -> Pairs:
    """Open a source of image-caption pairs.

    Args:
        source: one of

            - ``"scenes"`` or ``"scenes:held-out"``: synthetic scenes, see :mod:`dalle_fast.data.sources.scenes`;
            - a folder of images, each with a ``.txt`` of the same stem beside it, searched recursively; each line of
              that is a caption, of which training sees another each epoch;
            - a ``.csv``, ``.tsv`` or ``.jsonl`` manifest with ``image`` (relative to the manifest) and ``caption``, or
              ``filepath`` and ``title``, ``file_name`` and ``text``, ``image`` and ``text``;
            - a ``.tar`` in WebDataset naming, a folder of them, a glob such as ``"shards/*.tar"``, braces such as
              ``"shards/{00000..00099}.tar"``, or several of these joined by ``::``; they are indexed when they are
              first opened, see :mod:`dalle_fast.data.sources.tar_index`;
            - a view of another source, see :mod:`dalle_fast.data.sources.view`.
        workers: processes that index tar shards; None is one per processor.

    Samples that cannot be used are named in ``skipped``. Captions are cleaned, see :mod:`dalle_fast.captions`.

    Raises:
        ValueError: there is no such source, a shard that braces name is missing, or there is no pair at all.
    """
    return _open(source, workers, ())


def _open(source: str | Path, workers: int | None, views: tuple[str, ...]) -> Pairs:
    """``open_pairs`` for the source of ``views``, each a view of the next."""
    if str(source) in ("scenes", "scenes:held-out"):
        return SceneCorpus(held_out=str(source) == "scenes:held-out")
    path = Path(source)
    pairs: Pairs
    if (path / VIEW).is_file():
        return _open_view(path, workers, views)
    if tars := find_shards(source):
        pairs = ShardPairs(tars, workers)
    elif path.is_dir():
        pairs = index_folder(path)
    elif path.is_file() and path.suffix.lower() in TABLES:
        pairs = index_manifest(path)
    else:
        problem = "a file of another kind" if path.exists() else "nothing there"
        raise ValueError(f"source: expected a folder, .csv, .tsv, .jsonl, .tar or 'scenes', got {source} ({problem})")
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
    return _open_view(folder, workers, ())


def _open_view(folder: Path, workers: int | None, views: tuple[str, ...]) -> View:
    place = os.path.realpath(folder)
    if place in views or len(views) >= MAX_VIEWS:
        problem = "of itself" if place in views else f"of a view, and so on, {MAX_VIEWS} times"
        raise ValueError(f"view: expected a view of a source, got a view {problem} in {folder}")
    source, fingerprint = read_view(folder)
    pairs = _open(source, workers, (*views, place))
    if fingerprint_of(pairs) != fingerprint:
        raise ValueError(f"view: expected the pairs that {folder} was made of, got others in {source}")
    return View(pairs, folder)


def find_shards(source: str | Path) -> list[Path]:
    """The tar shards of a source, in order: a single one, those of a folder, or those that a name of several names.

    Raises:
        ValueError: one of several parts or of the names in braces has no shard.
    """
    path, name = Path(source), os.fspath(source)
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() == ".tar" and not file.is_dir())
    if path.is_file():
        return [path] if path.suffix.lower() == ".tar" else []
    if not names_several(name):
        return []
    expanded = [one for part in parts_of(name) for one in (expand_braces(part) if not os.path.exists(part) else [part])]
    if expanded == [name]:  # a glob
        return [Path(match) for match in sorted(glob.glob(name))]
    shards: dict[Path, None] = {}
    for one in expanded:
        found = find_shards(one)
        if not found:
            raise ValueError(f"source: expected tar shards by all names in {source}, got none by {one}")
        shards.update(dict.fromkeys(found))
    return list(shards)
