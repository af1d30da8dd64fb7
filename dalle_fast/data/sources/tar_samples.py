"""The samples of a tar shard: members that share their name up to its first dot (WebDataset naming).

A sample is an image and a ``.txt``, or a ``.json`` with ``caption``.
"""

from __future__ import annotations

import json
import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from ..pairs import IMAGE_EXTENSIONS, Skipped, Unusable, caption_of, extension_of

BLOCK = tarfile.BLOCKSIZE


class Record(NamedTuple):
    """The place of a sample in its shard: sizes in bytes, everything else in blocks of 512."""

    image: int
    image_size: int
    caption: int
    caption_size: int
    header: int  # blocks from the start of the image's header, which holds the sample's name, to the image
    caption_is_json: int

    def caption_from(self, content: bytes) -> str:
        """The caption in a ``.txt``, or under ``caption`` in a ``.json``. Raises Unusable."""
        if not self.caption_is_json:
            return caption_of(content)
        try:
            fields = json.loads(content)
        except ValueError as error:
            raise Unusable(f"the caption is not JSON: {error}") from None
        return caption_of(fields.get("caption") if isinstance(fields, dict) else None)


def find_samples(file: BinaryIO, shard: str) -> tuple[list[Record], list[Skipped]]:
    """The usable samples of an open shard in order, and those that are not.

    Args:
        shard: its name, for the reports.

    Raises:
        OSError: the file cannot be read.
    """
    skipped: list[Skipped] = []
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}  # key -> "image", "txt", "json" -> member
    file_size = os.fstat(file.fileno()).st_size
    try:
        for member in _members(file, file_size):
            key, extension = key_and_extension(member.name)
            kind = "image" if extension in IMAGE_EXTENSIONS else extension
            if member.isreg() and key and kind in ("image", "txt", "json"):
                samples.setdefault(key, {})[kind] = member
    except tarfile.TarError as error:
        skipped.append(Skipped(shard, str(error)))
    records = []
    for key, parts in samples.items():
        try:
            records.append(_record(file, file_size, parts))
        except Unusable as error:
            skipped.append(Skipped(f"{shard}:{key}", str(error)))
    return records, skipped


def _members(file: BinaryIO, file_size: int) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file. Raises tarfile.TarError where it is damaged, after the members ahead of the damage."""
    if not file_size:
        raise tarfile.ReadError("the file is empty")
    with tarfile.open(fileobj=file, mode="r:") as tar:
        try:
            while member := tar.next():
                yield member
            file.seek(tar.offset)
            if file.read(BLOCK) != bytes(BLOCK):  # tarfile takes a broken header for the end
                raise tarfile.ReadError("expected a header or the end mark")
        except tarfile.TarError as error:
            place = min(tar.offset, file_size)
            raise tarfile.ReadError(f"truncated or damaged at byte {place}: {error}") from error


def key_and_extension(member: str) -> tuple[str, str]:
    """Key of the sample ("" if none) and extension of the member."""
    folder, name = posixpath.split(member)
    stem, _, rest = name.partition(".")
    return posixpath.join(folder, stem) if stem else "", extension_of(rest)


def _record(file: BinaryIO, file_size: int, parts: dict[str, tarfile.TarInfo]) -> Record:
    """The record of a sample, whose caption is read. Raises Unusable."""
    if any(part.offset_data + part.size > file_size for part in parts.values()):
        raise Unusable("truncated")
    if "image" not in parts:
        raise Unusable("no image")
    image, caption = parts["image"], parts.get("txt") or parts.get("json")
    if not image.size:
        raise Unusable("the image file is empty")
    if caption is None:
        raise Unusable("no caption")
    record = Record(
        image.offset_data // BLOCK,
        image.size,
        caption.offset_data // BLOCK,
        caption.size,
        (image.offset_data - image.offset) // BLOCK,
        "txt" not in parts,
    )
    if max(record) >= 2**32 or record.header >= 2**16:
        raise Unusable("4 GiB or more, or beyond 2 TiB of the shard")
    record.caption_from(os.pread(file.fileno(), caption.size, caption.offset_data))
    return record
