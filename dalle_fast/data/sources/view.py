"""Views: some of the pairs of a source, without a copy of any.

A view is a folder of ``view.json`` (the source, its fingerprint, the number of pairs kept, and dropped for each
reason), ``kept.npy`` (int64, the indices of the pairs kept, ascending) and ``dropped.jsonl`` (index, name and reason of
each other pair). It is a source like any other: ``open_pairs`` reads it, and there may be views of it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...files import new_folder
from ..pairs import BrokenSample, Pair, Pairs, Skipped, check_index

VIEW = "view.json"
_KEPT, _DROPPED = "kept.npy", "dropped.jsonl"
_FORMAT = "dalle_fast.view"
_PROBES = 256  # pairs that a fingerprint reads


class Dropped(NamedTuple):
    """A pair that a view leaves out."""

    row: int
    reason: str
    details: dict[str, Any]  # for the report


class View:
    """The pairs of a source that the view in ``folder`` keeps. Their indices stay on disk and are read as needed."""

    def __init__(self, pairs: Pairs, folder: Path) -> None:
        self._pairs = pairs
        self._folder = folder
        self._kept = np.load(folder / _KEPT, mmap_mode="r")

    def __reduce__(self) -> Any:  # else data workers that are spawned would get a copy of the indices
        return View, (self._pairs, self._folder)

    @property
    def skipped(self) -> Collection[Skipped]:
        return self._pairs.skipped

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Pair:
        return self._pairs[self._place(index)]

    def captions(self) -> Iterator[str]:
        return (self.caption(index) for index in range(len(self)))

    def caption(self, index: int) -> str:
        return self._pairs.caption(self._place(index))

    def name(self, index: int) -> str:
        return self._pairs.name(self._place(index))

    def image_size(self, index: int) -> tuple[int, int]:
        return self._pairs.image_size(self._place(index))

    def _place(self, index: int) -> int:
        """The index of a pair in the source."""
        check_index(index, len(self))
        return int(self._kept[index])


def fingerprint_of(pairs: Pairs) -> str:
    """A hash that tells sources apart: of the number of pairs, and of names and captions spread over them."""
    digest = hashlib.blake2b(str(len(pairs)).encode(), digest_size=16)
    for index in np.linspace(0, len(pairs) - 1, min(_PROBES, len(pairs)), dtype=np.int64).tolist():
        try:
            digest.update(f"\0{pairs.name(index)}\0{pairs.caption(index)}".encode(errors="surrogateescape"))
        except BrokenSample as error:
            raise ValueError(f"pairs: expected them as they were when they were opened, got {error}") from None
    return digest.hexdigest()


def read_view(folder: Path) -> tuple[str, str]:
    """The source of a view, and the fingerprint that it had.

    Raises:
        ValueError: the folder is no intact view.
    """
    try:
        view = json.loads((folder / VIEW).read_text(encoding="utf-8"))
        if view["format"] != _FORMAT:
            raise ValueError(f"got the format {view['format']}")
        kept = np.load(folder / _KEPT, mmap_mode="r").shape
        if kept != (view["kept"],):
            raise ValueError(f"expected {view['kept']} indices, got {list(kept)}")
        return view["source"], view["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise ValueError(f"view: expected {VIEW} and {_KEPT} in {folder}, got {error}") from None


def write_view(
    folder: str | Path, source: str | Path, pairs: Pairs, dropped: Iterable[Dropped], settings: dict[str, Any]
) -> dict[str, int]:
    """Write a view of all pairs but those dropped.

    Args:
        folder: a new one.
        source: the name that ``open_pairs`` opened as ``pairs``.
        dropped: by ascending index.
        settings: of the choice; for the reader of ``view.json``.

    Returns:
        the number of pairs dropped for each reason.

    Raises:
        ValueError: the folder is not new, or no pair is left.
    """
    counts: Counter[str] = Counter()
    keeps = np.ones(len(pairs), bool)
    source = os.fspath(source)
    if os.path.exists(source) or glob.has_magic(source):
        source = os.path.abspath(source)
    with new_folder(folder) as partial:
        with (partial / _DROPPED).open("w", encoding="utf-8") as file:
            for row, reason, details in dropped:
                keeps[row] = False
                counts[reason] += 1
                line = {"index": row, "name": _name(pairs, row), "reason": reason, **details}
                file.write(json.dumps(line) + "\n")
        kept = np.flatnonzero(keeps)
        if not len(kept):
            raise ValueError(f"pairs: expected some to keep of {source}, got none: {dict(counts)}")
        np.save(partial / _KEPT, kept.astype("<i8"))
        view = {
            "format": _FORMAT,
            "source": source,
            "fingerprint": fingerprint_of(pairs),
            "pairs": len(pairs),
            "kept": len(kept),
            "dropped": dict(counts),
            "settings": settings,
        }
        (partial / VIEW).write_text(json.dumps(view, indent=2) + "\n", encoding="utf-8")
    return dict(counts)


def _name(pairs: Pairs, index: int) -> str:
    try:
        return pairs.name(index)
    except BrokenSample as error:
        return error.name
