"""Image-caption pairs: the types and helpers that all sources share."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple, Protocol

import numpy as np

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


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
    """A source of pairs, as ``open_pairs`` returns it. Reading by index may raise :class:`BrokenSample`."""

    @property
    def skipped(self) -> Collection[Skipped]:
        """Samples that were left out when the source was opened."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...

    def captions(self) -> Iterator[str]:
        """All captions in order, without reading an image."""

    def caption(self, index: int) -> str:
        """The caption of a pair, without reading its image."""

    def name(self, index: int) -> str:
        """The name of a pair in reports."""

    def image_size(self, index: int) -> tuple[int, int]:
        """Width and height of an image as its header states them, without decoding it."""


class Unusable(Exception):
    """A sample cannot be used; the message is the reason, as reports give it."""


def check_index(index: int, count: int) -> None:
    """Raise IndexError unless the index is one of ``count``."""
    if not 0 <= index < count:
        raise IndexError(f"index: expected 0 to {count - 1}, got {index}")


def caption_of(caption: object) -> str:
    """A caption, text or UTF-8, without the white space around it. Raises Unusable."""
    if isinstance(caption, bytes):
        caption = caption.decode("utf-8-sig", errors="surrogateescape")
    if not isinstance(caption, str) or not caption.strip():
        raise Unusable("no caption")
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise Unusable("the caption is not valid Unicode") from None
    return caption.strip()


def extension_of(name: str) -> str:
    """The part after the last dot, in lower case."""
    return name.rpartition(".")[2].lower()
