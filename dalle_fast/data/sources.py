"""Indexing of what pairs are stored in. Whatever is wrong with a sample, it is skipped by name and the rest goes on."""

from __future__ import annotations

import csv
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from .pairs import IndexedPairs

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


class _Unusable(Exception):
    """Why one sample cannot be used."""


def _caption(caption: object) -> str:
    if isinstance(caption, bytes):
        caption = caption.decode("utf-8-sig", errors="surrogateescape")
    if not isinstance(caption, str) or not caption.strip():
        raise _Unusable("no caption")
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise _Unusable("the caption is not valid Unicode") from None
    return caption.strip()


def _image_size(path: Path) -> int:
    """Bytes of an image file."""
    if not path.is_file():
        raise _Unusable("no image")
    size = path.stat().st_size
    if not size:
        raise _Unusable("the image file is empty")
    return size


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def index_folder(pairs: IndexedPairs, root: Path) -> None:
    """Add every image below ``root`` whose caption is in a ``.txt`` of the same stem."""
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        visible = sorted(file for file in files if not file.startswith("."))
        images = [file for file in visible if _extension(file) in IMAGE_EXTENSIONS]
        captions = {Path(file).stem: file for file in visible if _extension(file) == "txt"}
        for file in images:
            path = Path(folder, file)
            name = str(path.relative_to(root))
            try:
                if path.stem not in captions:
                    raise _Unusable("no caption")
                caption = _caption(Path(folder, captions[path.stem]).read_bytes())
                pairs.add(name, caption, str(path), 0, _image_size(path))
            except (_Unusable, OSError) as error:
                pairs.skip(name, str(error))
        for stem in sorted(captions.keys() - {Path(file).stem for file in images}):
            pairs.skip(str(Path(folder, captions[stem]).relative_to(root)), "no image")


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


def index_manifest(pairs: IndexedPairs, path: Path) -> None:
    """Add the rows of a CSV or JSONL file with ``image``, relative to the file's folder, and ``caption``."""
    rows = _csv_rows(path) if _extension(path.name) == "csv" else _jsonl_rows(path)
    for number, row in rows:
        name = f"{path.name}:{number}"
        try:
            if not isinstance(row, dict):
                raise _Unusable(f"not a row: {row}")
            if not isinstance(row.get("image"), str) or not row["image"]:
                raise _Unusable("no image")
            caption = _caption(row.get("caption"))
            image = path.parent / row["image"]
            pairs.add(f"{name} {row['image']}", caption, str(image), 0, _image_size(image))
        except (_Unusable, OSError, ValueError) as error:  # ValueError: a path with a NUL in it
            pairs.skip(name, str(error))


def index_shards(pairs: IndexedPairs, shards: list[Path]) -> None:
    """Add the samples of tar files: members that share their name up to its first dot (WebDataset naming).

    A sample is an image and a ``.txt``, or a ``.json`` with ``caption``. Only offsets are kept.
    """
    for shard in shards:
        try:
            with shard.open("rb") as file:
                _index_shard(pairs, shard, file)
        except (tarfile.TarError, OSError) as error:
            pairs.skip(shard.name, str(error))


def _index_shard(pairs: IndexedPairs, shard: Path, file: BinaryIO) -> None:
    file_size = os.fstat(file.fileno()).st_size
    if not file_size:
        raise tarfile.ReadError("the file is empty")
    samples: dict[str, dict[str, tuple[int, int]]] = {}  # key -> "image", "txt", "json" -> offset, size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        try:
            while member := tar.next():
                path = PurePosixPath(member.name)
                stem, _, rest = path.name.partition(".")
                extension = _extension(rest)
                kind = "image" if extension in IMAGE_EXTENSIONS else extension
                if member.isreg() and stem and kind in ("image", "txt", "json"):
                    samples.setdefault(str(path.with_name(stem)), {})[kind] = (member.offset_data, member.size)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a broken header for the end
                raise tarfile.ReadError("expected a header or the end mark")
        except tarfile.TarError as error:
            pairs.skip(shard.name, f"truncated or damaged at byte {min(tar.offset, file_size)}: {error}")
    for key, parts in samples.items():
        name = f"{shard.name}:{key}"
        try:
            if any(offset + size > file_size for offset, size in parts.values()):
                raise _Unusable("truncated")
            if "image" not in parts:
                raise _Unusable("no image")
            if not parts["image"][1]:
                raise _Unusable("the image file is empty")
            pairs.add(name, _shard_caption(file, parts), str(shard), *parts["image"])
        except _Unusable as error:
            pairs.skip(name, str(error))


def _shard_caption(file: BinaryIO, parts: dict[str, tuple[int, int]]) -> str:
    for kind in ("txt", "json"):
        if kind in parts:
            offset, size = parts[kind]
            file.seek(offset)
            content = file.read(size)
            break
    else:
        raise _Unusable("no caption")
    if kind == "txt":
        return _caption(content)
    try:
        fields = json.loads(content)
    except ValueError as error:
        raise _Unusable(f"the caption is not JSON: {error}") from None
    return _caption(fields.get("caption") if isinstance(fields, dict) else None)
