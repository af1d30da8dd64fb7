"""Files and folders that appear complete or not at all, and the hash of a file."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(path: str | Path) -> None:
    """Raise ValueError if there is something at ``path`` and it is not an empty folder."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"output folder: expected a new or empty one, got {path}")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A hidden folder to fill, which takes the name ``path`` when the block ends well and is removed when it fails.

    Raises:
        ValueError: ``path`` exists and is not an empty folder.
    """
    check_new(path)
    path = Path(path)
    partial = path.absolute().with_name(f".{path.absolute().name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        for folder, _, files in os.walk(partial):
            for file in files:
                sync(Path(folder, file))
            sync(Path(folder))
        os.replace(partial, path)
        sync(path.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The hash of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
