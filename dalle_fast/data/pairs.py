"""Image-caption pairs: the types and helpers that all sources share."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from ..captions import clean_caption

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")  # formats of images.py
MAX_CAPTION_BYTES = 1_000_000  # of a file of captions, or of a line of a manifest
SEPARATOR = "\x1f"  # between the captions of an image in one text; it is white space, so none of them holds it


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
    """A source of pairs, as ``open_pairs`` returns it. Reading by index may raise :class:`BrokenSample`.

    A source whose images have several captions also has ``all_captions(index)`` and ``seen_in(epoch, index)``, the pair
    with another caption each epoch; ``pairs[index]`` has the first.
    """

    @property
    def skipped(self) -> Collection[Skipped]:
        """Samples that were left out when the source was opened."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...

    def captions(self) -> Iterator[str]:
        """All captions in order, without reading an image; one after the other where an image has several."""

    def caption(self, index: int) -> str:
        """The caption of a pair, the first if its image has several, without reading the image."""

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


def captions_at(pairs: Pairs, index: int) -> list[str]:
    """All captions of a pair, of which there may be several for its image."""
    all_captions = getattr(pairs, "all_captions", None)
    return all_captions(index) if all_captions else [pairs.caption(index)]


def caption_of(caption: object) -> str:
    """A caption, text or UTF-8, in clean form. Raises Unusable."""
    if isinstance(caption, bytes):
        caption = caption.decode("utf-8-sig", errors="surrogateescape")
    if not isinstance(caption, str):
        raise Unusable("no caption")
    try:
        caption.encode()
        caption = clean_caption(caption)
    except UnicodeEncodeError:
        raise Unusable("the caption is not valid Unicode") from None
    except ValueError as error:
        raise Unusable(str(error)) from None
    if not caption:
        raise Unusable("no caption")
    return caption


def captions_of(captions: object) -> list[str]:
    """The captions of an image, in clean form: the lines of UTF-8, the members of a list, or one text. Raises Unusable.

    Empty ones are left out. A text that is not a file of its own is one caption, whatever line breaks it has.
    """
    if isinstance(captions, bytes):
        if captions.startswith(codecs.BOM_UTF8):
            captions = captions[len(codecs.BOM_UTF8) :]
        captions = [line for line in captions.splitlines() if line.strip()]
    if not isinstance(captions, list):
        return [caption_of(captions)]
    if not all(isinstance(caption, (str, bytes)) for caption in captions):
        raise Unusable("no caption")
    found = []
    for caption in captions:
        try:
            found.append(caption_of(caption))
        except Unusable as error:
            if str(error) != "no caption":
                raise
    if not found:
        raise Unusable("no caption")
    return found


def extension_of(name: str) -> str:
    """The part after the last dot, in lower case."""
    return name.rpartition(".")[2].lower()
