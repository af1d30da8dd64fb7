"""Pairs in tar shards, located by index files. Only the names and lengths of the shards are in memory."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..images import decode_image, read_image_size, reason_of
from ..pairs import BrokenSample, Pair, Skipped, Unusable, check_index
from .tar_index import OpenShard, Record, ShardIndex, ShardTable, index_shards

MAX_OPEN = 128  # shards per process, at two files each


class ShardPairs:
    """Image-caption pairs, numbered through all shards.

    Args:
        shards: tar files in WebDataset naming. Those without an index file get one, see ``tar_index.py``.
        workers: processes that index them; None is one per processor.

    Raises:
        ValueError: a shard changes while it is indexed.
        OSError: an index cannot be written anywhere.
    """

    def __init__(self, shards: Sequence[Path], workers: int | None = None) -> None:
        indexes, unreadable = index_shards(shards, workers)
        self.skipped: Collection[Skipped] = SkippedInShards(indexes, unreadable)
        self._table = ShardTable([index for index in indexes if index.samples])
        self._ends = self._table.samples.cumsum()
        self._opened = _opener(self._table)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, number: int) -> Pair:
        return self.seen_in(0, number)

    def seen_in(self, epoch: int, number: int) -> Pair:
        """The pair as an epoch sees it: with another of the image's captions each time, in turn."""
        files, record = self.find(number)
        try:
            image, captions = decode_image(files.image(record)), files.captions(record)
            return Pair(image, captions[epoch % len(captions)])
        except Exception as error:  # on damaged bytes Pillow's decoders raise nearly anything
            raise BrokenSample(files.name(record), reason_of(error)) from error

    def find(self, number: int) -> tuple[OpenShard, Record]:
        """The files of a pair, and its place in them. Raises BrokenSample if they have changed."""
        check_index(number, len(self))
        shard = int(self._ends.searchsorted(number, side="right"))
        try:
            files = self._opened(shard)
            return files, files.record(number - int(self._ends[shard] - self._table.samples[shard]))
        except (OSError, ValueError) as error:
            name = os.path.basename(self._table[shard].shard)
            raise BrokenSample(name, reason_of(error)) from error

    def captions(self) -> Iterator[str]:
        """All captions in order, shard after shard, without reading an image."""
        for index in self._table:
            shard = OpenShard(index)
            for record in index.records():
                with suppress(Unusable):  # an index made before captions had to be clean
                    yield from shard.captions(record)

    def caption(self, number: int) -> str:
        return self.all_captions(number)[0]

    def all_captions(self, number: int) -> list[str]:
        """All captions of an image."""
        files, record = self.find(number)
        try:
            return files.captions(record)
        except (OSError, Unusable) as error:
            raise BrokenSample(files.name(record), reason_of(error)) from error

    def name(self, number: int) -> str:
        files, record = self.find(number)
        return files.name(record)

    def image_size(self, number: int) -> tuple[int, int]:
        files, record = self.find(number)
        try:
            return read_image_size(functools.partial(files.image, record), record.image_size)
        except Exception as error:  # as above
            raise BrokenSample(files.name(record), reason_of(error)) from error

    def __getstate__(self) -> dict[str, Any]:
        """Without open files: data workers that are spawned open their own."""
        return {name: value for name, value in self.__dict__.items() if name != "_opened"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._opened = _opener(self._table)


def _opener(table: ShardTable) -> Callable[[int], OpenShard]:
    """A function that opens shards by number, and keeps those used last."""
    return functools.lru_cache(MAX_OPEN)(lambda shard: OpenShard(table[shard]))


class SkippedInShards(Collection[Skipped]):
    """The samples of some shards that cannot be used. Only their number is in memory."""

    def __init__(self, indexes: list[ShardIndex], unreadable: list[Skipped]) -> None:
        self._table = ShardTable([index for index in indexes if index.skipped])
        self._unreadable = unreadable

    def __len__(self) -> int:
        return int(self._table.skipped.sum()) + len(self._unreadable)

    def __iter__(self) -> Iterator[Skipped]:
        yield from self._unreadable
        for index in self._table:
            yield from index.skipped_samples()

    def __contains__(self, sample: object) -> bool:
        return any(sample == skipped for skipped in self)
