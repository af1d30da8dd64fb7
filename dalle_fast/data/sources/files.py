"""Folders and manifests of pairs. A sample with anything wrong is skipped, by name, and the rest are read."""

from __future__ import annotations

import csv
import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..images import decode_image, read_image_size, reason_of
from ..pairs import IMAGE_EXTENSIONS, BrokenSample, Pair, Skipped, Unusable, caption_of, check_index, extension_of


def _check_image(path: Path) -> None:
    if not path.is_file():
        raise Unusable("no image")
    if not path.stat().st_size:
        raise Unusable("the image file is empty")


class FilePairs:
    """Pairs whose images are files of their own.

    Names, paths and captions are held in two flat arrays, which forked data workers share.
    """

    def __init__(self) -> None:
        self.skipped: list[Skipped] = []
        self._text = bytearray()  # name, NUL, path, NUL, caption of every pair
        self._ends = array("q")  # the end of each pair's text

    def add(self, name: str, path: Path, caption: str) -> None:
        self._text += b"\0".join((os.fsencode(name), os.fsencode(path), caption.encode()))
        self._ends.append(len(self._text))

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(Skipped(name, reason))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Pair:
        check_index(index, len(self))
        name, path, caption = self._texts(index)
        try:
            return Pair(decode_image(Path(os.fsdecode(path)).read_bytes()), caption.decode())
        except Exception as error:  # on damaged bytes Pillow's decoders raise nearly anything
            raise BrokenSample(os.fsdecode(name), reason_of(error)) from error

    def captions(self) -> Iterator[str]:
        return (self.caption(index) for index in range(len(self)))

    def caption(self, index: int) -> str:
        return self._texts(index)[2].decode()

    def name(self, index: int) -> str:
        return os.fsdecode(self._texts(index)[0])

    def image_size(self, index: int) -> tuple[int, int]:
        name, path, _ = self._texts(index)
        try:
            with open(path, "rb") as file:
                length = os.fstat(file.fileno()).st_size
                return read_image_size(lambda size: os.pread(file.fileno(), size, 0), length)
        except Exception as error:  # as above
            raise BrokenSample(os.fsdecode(name), reason_of(error)) from error

    def _texts(self, index: int) -> list[bytes]:
        """Name, path and caption of a pair."""
        begin = self._ends[index - 1] if index else 0
        return bytes(self._text[begin : self._ends[index]]).split(b"\0", 2)


def index_folder(root: Path) -> FilePairs:
    """Every image below ``root`` whose caption is in a ``.txt`` of the same stem."""
    pairs = FilePairs()
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        visible = sorted(file for file in files if not file.startswith("."))
        images = [file for file in visible if extension_of(file) in IMAGE_EXTENSIONS]
        captions = {Path(file).stem: file for file in visible if extension_of(file) == "txt"}
        for file in images:
            path = Path(folder, file)
            name = str(path.relative_to(root))
            try:
                if path.stem not in captions:
                    raise Unusable("no caption")
                caption = caption_of(Path(folder, captions[path.stem]).read_bytes())
                _check_image(path)
                pairs.add(name, path, caption)
            except (Unusable, OSError) as error:
                pairs.skip(name, str(error))
        for stem in sorted(captions.keys() - {Path(file).stem for file in images}):
            pairs.skip(str(Path(folder, captions[stem]).relative_to(root)), "no image")
    return pairs


def _csv_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        missing = {"image", "caption"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"manifest {path}: expected the columns image and caption, got {reader.fieldnames}")
        while True:
            try:
                row: Any = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                row = error
            yield reader.line_num, row


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except ValueError as error:
                    yield number, error


def index_manifest(path: Path) -> FilePairs:
    """The rows of a CSV or JSONL file with ``image``, relative to the file's folder, and ``caption``."""
    pairs = FilePairs()
    rows = _csv_rows(path) if extension_of(path.name) == "csv" else _jsonl_rows(path)
    for number, row in rows:
        name = f"{path.name}:{number}"
        try:
            if not isinstance(row, dict):
                raise Unusable(f"not a row: {row}")
            if not isinstance(row.get("image"), str) or not row["image"]:
                raise Unusable("no image")
            caption = caption_of(row.get("caption"))
            image = path.parent / row["image"]
            _check_image(image)
            pairs.add(f"{name} {row['image']}", image, caption)
        except (Unusable, OSError, ValueError) as error:  # ValueError: a path with a NUL in it
            pairs.skip(name, str(error))
    return pairs
