"""Views: some of the pairs of a source, without a copy of any.

A view is a folder of ``view.json`` (the source, its fingerprint, the number of pairs kept, and dropped for each
reason, the CRC-32 of ``kept.npy``), ``kept.npy`` (int64, the indices of the pairs kept, ascending) and
``dropped.jsonl`` (index, name and reason of each other pair). It is a source like any other: ``open_pairs`` reads it,
and there may be views of it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...files import crc_of, new_folder
from ..pairs import BrokenSample, Pair, Pairs, Skipped, captions_at, check_index
from .names import absolute_source

VIEW = "view.json"
_KEPT, _DROPPED = "kept.npy", "dropped.jsonl"
_FORMAT = "dalle_fast.view"
_PROBES = 256  # pairs that a fingerprint reads
_BLOCK = 1 << 20  # indices that are checked at once


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
        _check_kept(self._kept, len(pairs), folder)

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
        return itertools.chain.from_iterable(map(self.all_captions, range(len(self))))

    def caption(self, index: int) -> str:
        return self._pairs.caption(self._place(index))

    def all_captions(self, index: int) -> list[str]:
        """All captions of an image."""
        return captions_at(self._pairs, self._place(index))

    def seen_in(self, epoch: int, index: int) -> Pair:
        """The pair as an epoch sees it: with another of the image's captions each time, in turn."""
        place = self._place(index)
        seen_in = getattr(self._pairs, "seen_in", None)
        return seen_in(epoch, place) if seen_in else self._pairs[place]

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
            captions = "\n".join(captions_at(pairs, index))
            digest.update(f"\0{pairs.name(index)}\0{captions}".encode(errors="surrogateescape"))
        except BrokenSample as error:
            raise ValueError(f"pairs: expected them as they were when they were opened, got {error}") from None
    return digest.hexdigest()


def read_view(folder: Path) -> tuple[str, str]:
    """The source of a view, and the fingerprint that it had.

    Raises:
        ValueError: the folder is no intact view.
    """
    path = folder / _KEPT
    try:
        view = json.loads((folder / VIEW).read_text(encoding="utf-8"))
        if view["format"] != _FORMAT:
            raise ValueError(f"got the format {view['format']}")
        source, fingerprint = view["source"], view["fingerprint"]
        if not isinstance(source, str) or not isinstance(fingerprint, str):
            raise ValueError(f"expected names of the source and its fingerprint, got {source!r} and {fingerprint!r}")
        if not path.is_file():
            raise ValueError(f"{_KEPT}: no such file")
        if "kept_crc" in view and crc_of(path) != view["kept_crc"]:  # older views have none
            raise ValueError(f"{path}: expected it as it was written, got other bytes")
        try:
            kept = np.load(path, mmap_mode="r")
        except Exception as error:  # on damaged bytes numpy raises nearly anything
            raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
        if kept.shape != (view["kept"],) or kept.dtype != np.dtype("<i8"):
            raise ValueError(f"expected {view['kept']} indices, got {kept.dtype} {[*kept.shape]}")
        return source, fingerprint
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"view: expected {VIEW} and {_KEPT} in {folder}, got {error}") from None


def _check_kept(kept: np.ndarray, count: int, folder: Path) -> None:
    """Raise ValueError unless the indices ascend from 0 or more to less than ``count``."""
    last = -1
    for start in range(0, len(kept), _BLOCK):
        block = kept[start : start + _BLOCK]
        if block[0] <= last or (np.diff(block) <= 0).any():
            raise ValueError(f"view: expected ascending indices in {folder / _KEPT}, got others from number {start} on")
        last = int(block[-1])
    if last >= count:
        raise ValueError(f"view: expected indices up to {count - 1} in {folder / _KEPT}, got {last}")


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
    source = absolute_source(os.fspath(source))
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
            "kept_crc": crc_of(partial / _KEPT),
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
