"""Index files of tar shards: where the image and the caption of each sample are, looked up once.

The index of ``00000.tar`` is ``.dalle_fast_index/00000.tar.idx`` beside it or, where that cannot be written, in
``~/.cache/dalle_fast/index``. It is complete or absent, and holds for the size and modification time of the shard:

    header    see _HEADER
    samples   20 bytes each, see Record, in blocks of 51
    skipped   [name, reason] of what cannot be used, a JSON line each

The header, each block and all that is skipped are followed by their CRC-32, by which every read is checked.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import posixpath
import struct
import tarfile
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from ...files import write_atomically
from ..pairs import IMAGE_EXTENSIONS, Skipped, Unusable, caption_of, extension_of

FOLDER = ".dalle_fast_index"
BLOCK = tarfile.BLOCKSIZE
_MAGIC = b"DFINDEX1"
_HEADER = struct.Struct("<8sQqQQQ")  # magic; size and mtime in ns of the shard; samples; skipped, and their bytes
_CHECKSUM = struct.Struct("<I")
RECORD = struct.Struct("<IIIIHH")  # see Record
_IN_BLOCK = 51  # records: with their checksum 1 KB, which takes hardly longer to read than one of them
_SAMPLES_AT = _HEADER.size + _CHECKSUM.size
_STALE_AFTER = 3600  # seconds; by then whoever wrote a partial file is gone


class Record(NamedTuple):
    """Where a sample is in its shard: sizes in bytes, everything else in blocks of 512."""

    image: int
    image_size: int
    caption: int
    caption_size: int
    header: int  # blocks from the beginning of the image's header, which holds the sample's name, to the image
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


class ShardIndex(NamedTuple):
    """A shard and what its index says of it; the samples stay on disk."""

    shard: str
    file: str
    samples: int
    skipped: int

    def records(self) -> Iterator[Record]:
        """All in order. Raises ValueError where the file is damaged."""
        with open(self.file, "rb") as file:
            for block in range(0, self.samples, _IN_BLOCK):
                yield from map(Record._make, RECORD.iter_unpack(self.block_of(block, file.fileno())))

    def block_of(self, sample: int, file: int) -> bytes:
        """The packed records of the block that a sample is in. Raises ValueError where the open file is damaged."""
        first = sample - sample % _IN_BLOCK
        return self._read(file, _place(first), _place(min(first + _IN_BLOCK, self.samples)))

    def skipped_samples(self) -> Iterator[Skipped]:
        """All in order. Raises ValueError if their part of the file is damaged."""
        with open(self.file, "rb") as file:
            lines = self._read(file.fileno(), _place(self.samples), os.fstat(file.fileno()).st_size)
        yield from (Skipped(*json.loads(line)) for line in lines.splitlines())

    def _read(self, file: int, begin: int, end: int) -> bytes:
        """What is between two places of the open file, without the checksum at the end."""
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
    """The files of a shard, open for as long as somebody holds this. Forked processes can share it.

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
        """Where sample ``i`` is. Raises ValueError where the index is damaged."""
        return Record._make(RECORD.unpack_from(self._records(i, self._index), i % _IN_BLOCK * RECORD.size))

    def image(self, record: Record, size: int | None = None) -> bytes:
        """The image file of a sample, or its first ``size`` bytes."""
        return os.pread(self._shard, record.image_size if size is None else size, record.image * BLOCK)

    def caption(self, record: Record) -> str:
        """The caption of a sample. Raises Unusable."""
        return record.caption_from(os.pread(self._shard, record.caption_size, record.caption * BLOCK))

    def name(self, record: Record) -> str:
        """The name of a sample, as its header in the shard has it, or else where it is."""
        shard = os.path.basename(self._path)
        with suppress(OSError, tarfile.TarError), open(self._path, "rb") as file:
            file.seek((record.image - record.header) * BLOCK)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                if member := tar.next():
                    return f"{shard}:{_key_and_extension(member.name)[0]}"
        return f"{shard}:byte {record.image * BLOCK}"


def find_index(shard: str) -> ShardIndex | None:
    """The index of a shard, if there is one that is whole and holds for the shard as it is now."""
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
    """Where in an index file the block begins of which a sample is the first; or ends, if that is the last."""
    return _SAMPLES_AT + sample * RECORD.size + -(-sample // _IN_BLOCK) * _CHECKSUM.size


def _sealed(content: bytes) -> bytes:
    """With its checksum behind it."""
    return content + _CHECKSUM.pack(zlib.crc32(content))


def _unsealed(sealed: bytes) -> bytes | None:
    """Without the checksum; None if it is another content's."""
    content = sealed[: -_CHECKSUM.size]
    return content if sealed[-_CHECKSUM.size :] == _CHECKSUM.pack(zlib.crc32(content)) else None


def _version(stat: os.stat_result) -> tuple[int, int]:
    """What tells a shard from what it was before."""
    return stat.st_size, stat.st_mtime_ns


def _places(shard: str) -> list[str]:
    """Where the index of a shard may be, in this order."""
    parent, name = os.path.split(shard)
    return [f"{folder}/{name}.idx" for folder in _folders(parent)]


@functools.cache
def _folders(parent: str) -> tuple[str, str]:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(os.path.realpath(parent).encode(errors="surrogateescape")).hexdigest()[:16]
    return os.path.join(parent, FOLDER), os.path.join(cache, "dalle_fast", "index", digest)


# ---------------------------------------------------------------------------------------------- writing


def index_shards(shards: Sequence[Path], workers: int | None = None) -> tuple[list[ShardIndex], list[Skipped]]:
    """The index of each shard: the file that there is, or else a new one.

    Args:
        workers: processes that index shards; None is one for each processor. A build that is stopped has lost no shard
            that it was done with.

    Returns:
        the indexes, and the shards that cannot be read, which have none.

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
    """Index shards, several at a time; the reasons of those that cannot be read."""
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
    """Write the index of a shard; why not, where the shard cannot be read."""
    skipped: list[Skipped] = []
    records: list[Record] = []
    try:
        with open(shard, "rb") as file:
            stat = os.fstat(file.fileno())
            try:
                records = _scan(file, os.path.basename(shard), skipped)
            except tarfile.TarError as error:
                skipped.append(Skipped(os.path.basename(shard), str(error)))
    except OSError as error:
        return str(error)
    write_index(shard, stat, b"".join(RECORD.pack(*record) for record in records), skipped)
    return None


def write_index(shard: str, stat: os.stat_result, samples: bytes, skipped: Sequence[Skipped]) -> None:
    """Write the index of a shard, atomically, to the first place that takes it. Raises OSError where none does.

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
    """Remove what a build that was killed did not finish."""
    for folder in _folders(parent):
        for partial in Path(folder).glob(".*.partial"):
            if time.time() - partial.stat().st_mtime > _STALE_AFTER:
                partial.unlink(missing_ok=True)


def _scan(file: BinaryIO, shard: str, skipped: list[Skipped]) -> list[Record]:
    """The samples of a shard: members that share their name up to its first dot (WebDataset naming).

    A sample is an image and a ``.txt``, or a ``.json`` with ``caption``. What cannot be used is added to ``skipped``.
    """
    file_size = os.fstat(file.fileno()).st_size
    if not file_size:
        raise tarfile.ReadError("the file is empty")
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}  # key -> "image", "txt", "json" -> member
    with tarfile.open(fileobj=file, mode="r:") as tar:
        try:
            while member := tar.next():
                key, extension = _key_and_extension(member.name)
                kind = "image" if extension in IMAGE_EXTENSIONS else extension
                if member.isreg() and key and kind in ("image", "txt", "json"):
                    samples.setdefault(key, {})[kind] = member
            file.seek(tar.offset)
            if file.read(BLOCK) != bytes(BLOCK):  # tarfile takes a broken header for the end
                raise tarfile.ReadError("expected a header or the end mark")
        except tarfile.TarError as error:
            skipped.append(Skipped(shard, f"truncated or damaged at byte {min(tar.offset, file_size)}: {error}"))
    records = []
    for key, parts in samples.items():
        try:
            records.append(_record(file, file_size, parts))
        except Unusable as error:
            skipped.append(Skipped(f"{shard}:{key}", str(error)))
    return records


def _key_and_extension(member: str) -> tuple[str, str]:
    """What samples are told apart by, "" where there is nothing; and the kind of file."""
    folder, name = posixpath.split(member)
    stem, _, rest = name.partition(".")
    return posixpath.join(folder, stem) if stem else "", extension_of(rest)


def _record(file: BinaryIO, file_size: int, parts: dict[str, tarfile.TarInfo]) -> Record:
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
