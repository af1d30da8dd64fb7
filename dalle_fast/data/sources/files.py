"""Folders and manifests of pairs. A sample with anything wrong is skipped, by name, and the rest are read."""

from __future__ import annotations

import csv
import itertools
import json
import os
import stat
from array import array
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from ..images import decode_image, read_image_size, reason_of
from ..pairs import (
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    SEPARATOR,
    BrokenSample,
    Pair,
    Skipped,
    Unusable,
    captions_of,
    check_index,
    extension_of,
)

# Names of the columns of image and caption, in order of preference; the second is that of OpenCLIP's tables, the third
# that of Hugging Face's image folders.
COLUMNS = (("image", "caption"), ("filepath", "title"), ("file_name", "text"), ("image", "text"))
_SEPARATORS = {"csv": ",", "tsv": "\t"}
TABLES = (".csv", ".tsv", ".jsonl")


def _check_regular(path: Path) -> None:
    """Raise Unusable unless the path is a regular file, or OSError if there is nothing."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise Unusable("not a file")  # to open a FIFO may take for ever, and a device has no end


def _check_image(path: Path) -> None:
    if not path.exists() or path.is_dir():
        raise Unusable("no image")
    _check_regular(path)
    if not path.stat().st_size:
        raise Unusable("the image file is empty")


def _read(path: Path, limit: int | None = None) -> bytes:
    """The content of a file. Raises Unusable if it is no regular file, or has more than ``limit`` bytes."""
    _check_regular(path)
    with path.open("rb") as file:
        content = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(content) > limit:
        raise Unusable(f"the caption file has more than {limit:,} bytes")
    return content


class FilePairs:
    """Pairs whose images are files of their own.

    Names, paths and captions are held in two flat arrays, which forked data workers share.
    """

    def __init__(self) -> None:
        self.skipped: list[Skipped] = []
        self._text = bytearray()  # name, NUL, path, NUL, captions of every pair
        self._ends = array("q")  # the end of each pair's text

    def add(self, name: str, path: Path, captions: list[str]) -> None:
        self._text += b"\0".join((os.fsencode(name), os.fsencode(path), SEPARATOR.join(captions).encode()))
        self._ends.append(len(self._text))

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(Skipped(name, reason))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Pair:
        return self.seen_in(0, index)

    def seen_in(self, epoch: int, index: int) -> Pair:
        """The pair as an epoch sees it: with another of the image's captions each time, in turn."""
        check_index(index, len(self))
        name, path, _ = self._texts(index)
        captions = self.all_captions(index)
        try:
            return Pair(decode_image(_read(Path(os.fsdecode(path)))), captions[epoch % len(captions)])
        except Exception as error:  # on damaged bytes Pillow's decoders raise nearly anything
            raise BrokenSample(os.fsdecode(name), reason_of(error)) from error

    def captions(self) -> Iterator[str]:
        return itertools.chain.from_iterable(map(self.all_captions, range(len(self))))

    def caption(self, index: int) -> str:
        return self.all_captions(index)[0]

    def all_captions(self, index: int) -> list[str]:
        """All captions of an image."""
        return self._texts(index)[2].decode().split(SEPARATOR)

    def name(self, index: int) -> str:
        return os.fsdecode(self._texts(index)[0])

    def image_size(self, index: int) -> tuple[int, int]:
        name, path, _ = self._texts(index)
        try:
            _check_regular(Path(os.fsdecode(path)))
            with open(path, "rb") as file:
                length = os.fstat(file.fileno()).st_size
                return read_image_size(lambda size: os.pread(file.fileno(), size, 0), length)
        except Exception as error:  # as above
            raise BrokenSample(os.fsdecode(name), reason_of(error)) from error

    def _texts(self, index: int) -> list[bytes]:
        """Name, path and captions of a pair."""
        begin = self._ends[index - 1] if index else 0
        return bytes(self._text[begin : self._ends[index]]).split(b"\0", 2)


def index_folder(root: Path) -> FilePairs:
    """Every image below ``root`` whose captions are the lines of a ``.txt`` of the same stem.

    Links to folders are followed, after all other folders; each real folder is read once.
    """
    pairs = FilePairs()
    for folder, files in _folders(root, pairs):
        visible = sorted(file for file in files if not file.startswith("."))
        images = [file for file in visible if extension_of(file) in IMAGE_EXTENSIONS]
        captions = {Path(file).stem: file for file in visible if extension_of(file) == "txt"}
        for file in images:
            path = Path(folder, file)
            name = _name(path, root)
            try:
                if path.stem not in captions:
                    raise Unusable("no caption")
                found = captions_of(_read(Path(folder, captions[path.stem]), MAX_CAPTION_BYTES))
                _check_image(path)
                pairs.add(name, path, found)
            except (Unusable, OSError) as error:
                pairs.skip(name, str(error))
        for stem in sorted(captions.keys() - {Path(file).stem for file in images}):
            others = [file for file in visible if Path(file).stem == stem and file != captions[stem]]
            reason = f"no image of a known kind, only {others[0]}" if others else "no image"
            pairs.skip(_name(Path(folder, captions[stem]), root), reason)
        for file in visible:
            path = Path(folder, file)
            if extension_of(file) == "tar":
                pairs.skip(_name(path, root), f"a tar shard among folders; open such shards by {root}/**/*.tar")
            elif extension_of(file) not in (*IMAGE_EXTENSIONS, "txt") and path.is_symlink() and not path.exists():
                pairs.skip(_name(path, root), "a link to nothing")
    return pairs


def _name(path: Path, root: Path) -> str:
    return str(path.relative_to(root))


def _folders(root: Path, pairs: FilePairs) -> Iterator[tuple[str, list[str]]]:
    """Each folder below ``root`` with the names of its files. Those that cannot be read are named as skipped."""
    above = {_identity(folder) for folder in root.resolve().parents}
    seen: set[tuple[int, int]] = set()
    starts = [str(root)]  # links to folders are added as they are found

    def report(error: OSError) -> None:
        pairs.skip(_name(Path(error.filename), root), f"the folder cannot be read: {error.strerror}")

    for start in starts:  # grows
        links: list[str] = []
        if start != str(root) and _identity(start) in above:
            pairs.skip(_name(Path(start), root), "a link to a folder that this one is in")
            continue
        for folder, subfolders, files in os.walk(start, onerror=report):
            identity = _identity(folder)
            if identity is None or identity in seen:
                subfolders.clear()
                continue
            seen.add(identity)
            subfolders.sort()
            links += [os.path.join(folder, name) for name in subfolders if os.path.islink(os.path.join(folder, name))]
            yield folder, files
        starts += links


def _identity(folder: str | Path) -> tuple[int, int] | None:
    """The same for all names of a folder; None if there is none."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def find_columns(names: Collection[str]) -> tuple[str, str] | None:
    """The columns of image and caption among the names of all columns."""
    return next((columns for columns in COLUMNS if set(columns) <= set(names)), None)


class _Rows:
    """The lines of an open file, for the csv module, which is to see where a row begins and that the file has ended."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.row: list[str] = []  # the lines of the row that is being read
        self._length = 0  # of these, in characters
        self.number = 0  # of the last line
        self.ended = False

    def begin_row(self) -> None:
        self.row, self._length = [], 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_CAPTION_BYTES + 1)
        self.ended = not line
        if self.ended:
            raise StopIteration
        self.number += 1
        self.row.append(line)
        self._length += len(line)
        if self._length > MAX_CAPTION_BYTES:
            raise csv.Error(f"more than {MAX_CAPTION_BYTES:,} characters")
        return line


def _table_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows of a CSV or TSV file as dictionaries, each with the number of its last line, or an error and its line.

    Where the end of a row cannot be told, as after a quote that is never closed, the rest of the file is given up: what
    looks like a row there may be part of a caption.
    """
    separator = _SEPARATORS[extension_of(path.name)]
    limit = csv.field_size_limit()
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = _Rows(file)
        names: list[str] | None = None
        while True:
            lines.begin_row()
            row: list[str] = []
            problem = ""
            csv.field_size_limit(MAX_CAPTION_BYTES)  # one for the whole process, so it is put back
            try:
                row = next(csv.reader(lines, delimiter=separator, strict=True))
            except StopIteration:
                if names is None:
                    raise ValueError(f"manifest {path}: expected the names of the columns, got an empty file") from None
                return
            except csv.Error as error:
                problem = str(error)
                if len(lines.row) == 1 and len(lines.row[0]) <= MAX_CAPTION_BYTES and not lines.ended:
                    # A quote within a field, such as "red" box: the row has ended, whatever it says.
                    with suppress(csv.Error):
                        row, problem = next(csv.reader(lines.row, delimiter=separator)), ""
            finally:
                csv.field_size_limit(limit)
            if problem:
                first = lines.number - len(lines.row) + 1
                what = "a quote that is never closed" if lines.ended else problem
                yield first, csv.Error(f"{what}; the file is given up from here")
                return
            if names is None:
                names = row
                if not find_columns(names):
                    known = ", ".join(" and ".join(columns) for columns in COLUMNS[1:])
                    raise ValueError(
                        f"manifest {path}: expected the columns image and caption (or {known}), got {names}"
                    )
            elif row:  # else an empty line
                yield lines.number, dict(zip(names, row, strict=False))


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        number = 0
        while line := file.readline(MAX_CAPTION_BYTES + 1):
            number += 1
            if len(line) > MAX_CAPTION_BYTES:
                yield number, f"more than {MAX_CAPTION_BYTES:,} characters"
                while line and not line.endswith("\n"):
                    line = file.readline(MAX_CAPTION_BYTES)
            elif line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield number, error


def index_manifest(path: Path) -> FilePairs:
    """The rows of a CSV, TSV or JSONL file with an image, relative to the file's folder, and a caption, see COLUMNS.

    In JSONL the caption may be a list of captions.
    """
    pairs = FilePairs()
    rows = _jsonl_rows(path) if extension_of(path.name) == "jsonl" else _table_rows(path)
    for number, row in rows:
        name = f"{path.name}:{number}"
        try:
            if not isinstance(row, dict):
                raise Unusable(f"not a row: {str(row)[:200]}")
            image_column, caption_column = find_columns(row) or COLUMNS[0]
            file = row.get(image_column)
            if not isinstance(file, str) or not file:
                raise Unusable("no image")
            captions = captions_of(row.get(caption_column))
            image = path.parent / file
            _check_image(image)
            pairs.add(f"{name} {file}", image, captions)
        except (Unusable, OSError, ValueError) as error:  # ValueError: a path with a NUL in it
            pairs.skip(name, str(error))
    return pairs
