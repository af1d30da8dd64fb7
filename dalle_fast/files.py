"""Files and folders that appear complete or not at all, the hash of a file, and the log of a training.

Readers of a name find the old content or the new, never a part of either. Writers of the same name do not disturb each
other, whether threads, processes or nodes that share a disk: each writes under a hidden name of its own,
``.NAME.RANDOM.partial``, and renames it at the end. A failure removes that file or folder; a killed process leaves it.

A killed process loses only the file that it was writing. A crash of the node (power, kernel) loses nothing that was
written durably: once the call returns, content and name are on the disk. Without that, the file may be gone or damaged
afterwards, which suits content that is checked when it is read, or easily made again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_atomically(
    path: str | Path, content: str | bytes | Callable[[Path], object], *, durable: bool = True
) -> None:
    """Write a file, or replace it; of several writers the last one wins. Missing folders above it are made.

    Args:
        content: text, stored as UTF-8; bytes; or a function that writes the file whose path it is given.
        durable: wait until content and name are on the disk.

    Raises:
        OSError: the file cannot be written; what had the name before is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_name(path)
    try:
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        if durable:
            sync(partial)
        os.replace(partial, path)
        if durable:
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def check_new(path: str | Path) -> None:
    """Raise ValueError if there is something at ``path`` and it is not an empty folder."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"output folder: expected a new or empty one, got {path}")


def check_writable(path: str | Path) -> None:
    """Raise OSError unless ``write_atomically`` can write this file; makes missing folders above it."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"output file: expected the name of a file, got the folder {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_name(path)
    try:
        partial.touch()
    except OSError as error:
        raise OSError(f"output file: expected a folder that can be written, got {path.parent} ({error})") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A hidden folder to fill, which is written durably and takes the name ``path`` when the block ends well.

    Raises:
        ValueError: ``path`` exists and is not an empty folder.
        OSError: another writer of ``path`` was done first.
    """
    check_new(path)
    path = Path(path).absolute()
    partial = _partial_name(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        for folder, _, files in os.walk(partial):
            for file in files:
                sync(Path(folder, file))
            sync(Path(folder))
        os.replace(partial, path)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial_name(path: Path) -> Path:
    """A hidden name beside ``path`` that no other writer has."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of the log of a training: ``step``, and numbers, null, or lists and dicts of numbers by name.

    Other lines, damaged or half written, are dropped; their number is printed to stderr.
    """
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        found = [_record(line) for line in file if line.strip()]
    records = [record for record in found if record is not None]
    if dropped := len(found) - len(records):
        print(f"{path}: {dropped} damaged {'line' if dropped == 1 else 'lines'} dropped", file=sys.stderr)
    return records


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    values: list[Any] = []
    for value in record.values():
        inner = value.values() if isinstance(value, dict) else value
        values += [inner] if inner is None or isinstance(inner, (int, float, str)) else inner
    return record if all(value is None or _is_number(value) for value in values) else None


def _is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < 2**63) or (type(value) is float and math.isfinite(value))


def crc_of(path: Path) -> int:
    """The CRC-32 of a file, which tells damage, not malice.

    Raises:
        ValueError: something that is not a file, such as a FIFO, which could not be read to its end.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"expected a file, got {path}")
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc
