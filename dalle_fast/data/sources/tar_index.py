"""Index files of tar shards: the places of all samples, looked up once.

The index of ``00000.tar`` is ``.dalle_fast_index/00000.tar.idx`` beside it or, where that cannot be written, in
``~/.cache/dalle_fast/index``. It is complete or absent, and valid for one size and modification time of the shard:

    header    see _HEADER
    samples   20 bytes each, see Record, in blocks of 51
    skipped   [name, reason] of each sample that cannot be used, one JSON line each

The header, each block and the part of skipped samples are followed by their CRC-32, which every read checks.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
import tarfile
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ...files import write_atomically
from ..pairs import Skipped
from .tar_samples import BLOCK, Record, find_samples, members_of

FOLDER = ".dalle_fast_index"
_MAGIC = b"DFINDEX2"
_HEADER = struct.Struct("<8sQqQQQ")  # magic; size and mtime in ns of the shard; samples; skipped, and their bytes
_CHECKSUM = struct.Struct("<I")
RECORD = struct.Struct("<IIIIHH")  # the fields of a Record
_IN_BLOCK = 51  # records: with their checksum 1 KB, which takes hardly longer to read than one record
_SAMPLES_AT = _HEADER.size + _CHECKSUM.size
_STALE_AFTER = 3600  # seconds, after which the writer of a partial file must be gone


class ShardIndex(NamedTuple):
    """A shard and its index file: numbers of samples; the samples themselves stay on disk."""

    shard: str
    file: str
    samples: int
    skipped: int

    def records(self) -> Iterator[Record]:
        """All samples in order. Raises ValueError where the file is damaged."""
        with open(self.file, "rb") as file:
            for block in range(0, self.samples, _IN_BLOCK):
                yield from map(Record._make, RECORD.iter_unpack(self.block_of(block, file.fileno())))

    def block_of(self, sample: int, file: int) -> bytes:
        """The packed records of a sample's block. Raises ValueError where the open file is damaged."""
        first = sample - sample % _IN_BLOCK
        return self._read(file, _place(first), _place(min(first + _IN_BLOCK, self.samples)))

    def skipped_samples(self) -> Iterator[Skipped]:
        """All skipped samples in order. Raises ValueError if their part of the file is damaged."""
        with open(self.file, "rb") as file:
            lines = self._read(file.fileno(), _place(self.samples), os.fstat(file.fileno()).st_size)
        yield from (Skipped(*json.loads(line)) for line in lines.splitlines())

    def _read(self, file: int, begin: int, end: int) -> bytes:
        """The bytes between two offsets of the open file, without the checksum at their end. Raises ValueError."""
        content = _unsealed(os.pread(file, end - begin, begin))
        if content is None:
            place = f"bytes {begin} to {end} of {self.file}"
            raise ValueError(f"index: expected {place} as they were written, got others; delete it to make it anew")
        return content


class ShardTable:
    """The indexes of many shards as a few flat arrays, which forked data workers share."""

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        self._shards = np.array([os.fsencode(index.shard) for index in indexes], dtype="S")
        self._files = np.array([os.fsencode(index.file) for index in indexes], dtype="S")
        self.samples = np.array([index.samples for index in indexes], dtype=np.int64)
        self.skipped = np.array([index.skipped for index in indexes], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> ShardIndex:
        paths = os.fsdecode(self._shards[number]), os.fsdecode(self._files[number])
        return ShardIndex(*paths, int(self.samples[number]), int(self.skipped[number]))

    def __iter__(self) -> Iterator[ShardIndex]:
        return map(self.__getitem__, range(len(self)))


# ---------------------------------------------------------------------------------------------- reading


class OpenShard:
    """The files of a shard, open as long as this object lives. Forked processes can share it.

    Raises:
        OSError: one of them cannot be opened.
        ValueError: the shard has changed since it was indexed.
    """

    def __init__(self, index: ShardIndex) -> None:
        self._path, self._records = index.shard, index.block_of
        self._descriptors: list[int] = []
        for path in (index.shard, index.file):
            self._descriptors.append(os.open(path, os.O_RDONLY))
        self._shard, self._index = self._descriptors
        header = _read_header(self._index)
        if header is None or header[1:3] != _version(os.fstat(self._shard)):
            raise ValueError(f"{index.shard} has changed since it was indexed")

    def __del__(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)

    def record(self, i: int) -> Record:
        """The record of sample ``i``. Raises ValueError where the index is damaged."""
        return Record._make(RECORD.unpack_from(self._records(i, self._index), i % _IN_BLOCK * RECORD.size))

    def image(self, record: Record, size: int | None = None) -> bytes:
        """The image file of a sample, or its first ``size`` bytes."""
        return os.pread(self._shard, record.image_size if size is None else size, record.image * BLOCK)

    def captions(self, record: Record) -> list[str]:
        """The captions of a sample. Raises Unusable."""
        return record.captions_from(os.pread(self._shard, record.caption_size, record.caption * BLOCK))

    def name(self, record: Record) -> str:
        """The name of a sample from its header in the shard; its place if the header cannot be read."""
        shard = os.path.basename(self._path)
        with suppress(OSError, tarfile.ReadError), open(self._path, "rb") as file:
            file.seek((record.image - record.header) * BLOCK)
            if member := next(members_of(file), None):
                return f"{shard}:{member.name.rpartition('.')[0]}"
        return f"{shard}:byte {record.image * BLOCK}"


def find_index(shard: str) -> ShardIndex | None:
    """The index of a shard, if there is an intact one for the shard as it is now."""
    try:
        stat = os.stat(shard)
    except OSError:
        return None
    for path in _places(shard):
        try:
            with open(path, "rb", buffering=0) as file:
                header = _read_header(file.fileno())
        except OSError:
            continue
        if header is None:
            warnings.warn(f"index {path}: expected a whole one of this version; it is made anew", stacklevel=2)
        elif header[1:3] == _version(stat):
            return ShardIndex(shard, path, *header[3:5])
    return None


def _read_header(index: int) -> tuple[bytes, int, int, int, int, int] | None:
    """The header of an open index file, or None if it is damaged, cut short or of another version."""
    content = _unsealed(os.pread(index, _SAMPLES_AT, 0))
    if content is None or len(content) < _HEADER.size:
        return None
    header = _HEADER.unpack(content)
    magic, _, _, samples, _, skipped_bytes = header
    whole = _place(samples) + skipped_bytes + _CHECKSUM.size
    return header if magic == _MAGIC and os.fstat(index).st_size == whole else None


def _place(sample: int) -> int:
    """Offset in an index file: of the block that begins with this sample, or of the end of all blocks."""
    return _SAMPLES_AT + sample * RECORD.size + -(-sample // _IN_BLOCK) * _CHECKSUM.size


def _sealed(content: bytes) -> bytes:
    """The content, followed by its checksum."""
    return content + _CHECKSUM.pack(zlib.crc32(content))


def _unsealed(sealed: bytes) -> bytes | None:
    """The content without its checksum; None if they do not match."""
    content = sealed[: -_CHECKSUM.size]
    return content if sealed[-_CHECKSUM.size :] == _CHECKSUM.pack(zlib.crc32(content)) else None


def _version(stat: os.stat_result) -> tuple[int, int]:
    """The size and modification time of a shard: another version of it has others."""
    return stat.st_size, stat.st_mtime_ns


def _places(shard: str) -> list[str]:
    """The paths that the index of a shard may have, in order of preference."""
    parent, name = os.path.split(shard)
    return [f"{folder}/{name}.idx" for folder in _folders(parent)]


def _folders(parent: str) -> tuple[str, str]:
    """The folders for indexes of shards in ``parent``: beside them, and in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(parent, FOLDER), os.path.join(cache, "dalle_fast", "index", _digest_of(parent))


@functools.cache
def _digest_of(folder: str) -> str:
    """A name for a folder in the cache."""
    return hashlib.sha256(os.path.realpath(folder).encode(errors="surrogateescape")).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- writing


def index_shards(shards: Sequence[Path], workers: int | None = None) -> tuple[list[ShardIndex], list[Skipped]]:
    """The index of each shard: the existing file, or else a new one. A build that is stopped keeps what it finished.

    Args:
        workers: processes that index shards; None is one per processor.

    Returns:
        the indexes, and the shards that cannot be read and so have none.

    Raises:
        ValueError: a shard changes while it is read.
        OSError: an index cannot be written anywhere.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers: expected 1 or more, got {workers}")
    paths = [str(shard) for shard in shards]
    found = {path: find_index(path) for path in paths}
    missing = [path for path, index in found.items() if index is None]
    unreadable = {} if not missing else _build(missing, workers or os.cpu_count() or 1)
    for path in missing:
        if path not in unreadable:
            found[path] = find_index(path)
            if found[path] is None:
                raise ValueError(f"shard {path}: expected it to stay as it is while it is indexed, got a change")
    problems = [Skipped(os.path.basename(path), reason) for path, reason in unreadable.items()]
    return [index for index in found.values() if index is not None], problems


def _build(shards: list[str], workers: int) -> dict[str, str]:
    """Index shards in parallel. Returns, for each that cannot be read, the reason."""
    for parent in {os.path.dirname(shard) for shard in shards}:
        _remove_stale(parent)
    bar = tqdm(total=len(shards), desc="index", unit="shard", disable=None)  # None: on a tty only
    unreadable: dict[str, str] = {}
    with bar, ProcessPoolExecutor(min(workers, len(shards))) as pool:
        results = pool.map(_index_shard, shards) if workers > 1 < len(shards) else map(_index_shard, shards)
        for shard, problem in zip(shards, results, strict=True):
            bar.update()
            if problem is not None:
                unreadable[shard] = problem
    return unreadable


def _index_shard(shard: str) -> str | None:
    """Write the index of a shard. Returns the reason if the shard cannot be read."""
    try:
        with open(shard, "rb") as file:
            stat = os.fstat(file.fileno())
            records, skipped = find_samples(file, os.path.basename(shard))
    except OSError as error:
        return str(error)
    write_index(shard, stat, b"".join(RECORD.pack(*record) for record in records), skipped)
    return None


def write_index(shard: str, stat: os.stat_result, samples: bytes, skipped: Sequence[Skipped]) -> None:
    """Write the index of a shard, atomically, to the first place that can be written. Raises OSError if none can.

    Args:
        stat: of the shard when it was read.
        samples: packed records.
    """
    lines = "".join(json.dumps(sample) + "\n" for sample in skipped).encode()
    header = _HEADER.pack(_MAGIC, *_version(stat), len(samples) // RECORD.size, len(skipped), len(lines))
    size = _IN_BLOCK * RECORD.size
    blocks = [samples[start : start + size] for start in range(0, len(samples), size)]
    content = b"".join(map(_sealed, (header, *blocks, lines)))
    failed: OSError | None = None
    for path in map(Path, _places(shard)):
        try:
            write_atomically(path, content, durable=False)  # every read checks it
            return
        except OSError as error:
            failed = failed or error
    raise OSError(f"index of {shard}: expected a place to write it, got {failed}")


def _remove_stale(parent: str) -> None:
    """Remove partial files of a build that was killed."""
    for folder in _folders(parent):
        for partial in Path(folder).glob(".*.partial"):
            if time.time() - partial.stat().st_mtime > _STALE_AFTER:
                partial.unlink(missing_ok=True)
