"""Image-caption pairs by index, whatever they are stored in."""

from __future__ import annotations

import glob
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from .image import decode_image


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
    def skipped(self) -> Sequence[Skipped]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...

    def captions(self) -> Iterator[str]:
        """All captions in order, without reading an image."""


class IndexedPairs:
    """Pairs whose images are stretches of bytes in files.

    The index is a few flat arrays, which forked data workers share: about 32 bytes a pair, its name and its caption.
    """

    def __init__(self) -> None:
        self.skipped: list[Skipped] = []
        self._paths: list[str] = []
        self._records = array("q")  # path number, offset, size, end of text: 4 numbers a pair
        self._text = bytearray()  # name, NUL, caption of every pair

    def add(self, name: str, caption: str, path: str, offset: int, size: int) -> None:
        """Append the pair whose image is ``size`` bytes from ``offset`` of the file ``path``."""
        if not self._paths or self._paths[-1] != path:
            self._paths.append(path)
        self._text += name.encode(errors="surrogateescape") + b"\0" + caption.encode()
        self._records.extend((len(self._paths) - 1, offset, size, len(self._text)))

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(Skipped(name, reason))

    def __len__(self) -> int:
        return len(self._records) // 4

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        number, offset, size, _ = self._records[4 * index : 4 * index + 4]
        raw_name, caption = self._name_and_caption(index)
        name = raw_name.decode(errors="surrogateescape")
        try:
            with open(self._paths[number], "rb") as file:
                file.seek(offset)
                content = file.read(size)
            return Pair(decode_image(content), caption.decode())
        except Exception as error:  # on damaged bytes Pillow's decoders raise nearly anything
            raise BrokenSample(name, f"{type(error).__name__}: {error}") from error

    def captions(self) -> Iterator[str]:
        return (self._name_and_caption(index)[1].decode() for index in range(len(self)))

    def _name_and_caption(self, index: int) -> list[bytearray]:
        begin = self._records[4 * index - 1] if index else 0
        return self._text[begin : self._records[4 * index + 3]].split(b"\0", 1)


def open_pairs(source: str | Path) -> Pairs:
    """Open a source of image-caption pairs.

    Args:
        source: one of

            - ``"scenes"`` or ``"scenes:held-out"``: drawn scenes, see :mod:`dalle_fast.data.scenes`;
            - a folder of images, each with a ``.txt`` of the same stem beside it, searched recursively;
            - a ``.csv`` or ``.jsonl`` manifest with ``image`` (relative to the manifest) and ``caption``;
            - a ``.tar`` in WebDataset naming, a folder of them, or a glob such as ``"shards/*.tar"``.

    Samples that cannot be used are named in ``skipped``. A caption is stripped of the white space around it.

    Raises:
        ValueError: there is no such source, or it holds no pair at all.
    """
    from . import scenes, sources  # here, because both are written in terms of this module

    drawn: dict[str, Callable[[], Pairs]] = {
        "scenes": scenes.SceneCorpus,
        "scenes:held-out": lambda: scenes.SceneCorpus(held_out=True),
    }
    if str(source) in drawn:
        return drawn[str(source)]()
    path = Path(source)
    pairs = IndexedPairs()
    if path.is_dir():
        shards = sorted(path.glob("*.tar"))
        if shards:
            sources.index_shards(pairs, shards)
        else:
            sources.index_folder(pairs, path)
    elif path.is_file() and path.suffix.lower() == ".tar":
        sources.index_shards(pairs, [path])
    elif path.is_file() and path.suffix.lower() in (".csv", ".jsonl"):
        sources.index_manifest(pairs, path)
    elif not path.exists() and glob.has_magic(str(source)):
        sources.index_shards(pairs, [Path(name) for name in sorted(glob.glob(os.fspath(source)))])
    else:
        problem = "a file of another kind" if path.exists() else "nothing there"
        raise ValueError(f"source: expected a folder, .csv, .jsonl, .tar or 'scenes', got {source} ({problem})")
    if not len(pairs):
        first = f", the first {pairs.skipped[0].name}: {pairs.skipped[0].reason}" if pairs.skipped else ""
        raise ValueError(
            f"source: expected image-caption pairs, got none in {source} ({len(pairs.skipped)} skipped{first})"
        )
    return pairs
