"""Image codes and captions on disk: what the transformer trains on when images are encoded once.

The folder that :func:`dalle_fast.data.encode.encode_pairs` writes holds ``shard-00000``, ``shard-00001``, ...:

- ``codes.npy``: uint16 [n, draws, h, w], the codes of each image in each of its random augmentations ("draws");
- ``captions.txt``: UTF-8, each caption followed by a newline;
- ``index.npy``: [n] of ``end``, uint64, the byte of the caption's newline, and ``crc``, uint32 [draws], the CRC-32 of
  a draw's codes followed by the caption;
- ``skipped.jsonl``: the images that could not be read.

``meta.json``, written last, holds the settings of the encoding and the size of each file; ``skipped.jsonl`` beside it
holds the samples that the source had skipped, then those of all shards.
"""

from __future__ import annotations

import bisect
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .pairs import check_index

FORMAT = "dalle_fast.encoded.2"
META, CODES, CAPTIONS, INDEX = "meta.json", "codes.npy", "captions.txt", "index.npy"


class EncodedPair(NamedTuple):
    """Image codes, int64 [h, w], and the caption."""

    codes: np.ndarray
    caption: str


class _Shard(NamedTuple):
    """The files of a shard, mapped into memory."""

    codes: np.ndarray  # uint16 [n, draws, h, w]
    text: memoryview
    ends: np.ndarray  # uint64 [n]
    checksums: np.ndarray  # uint32 [n, draws]


def index_type(draws: int) -> np.dtype[Any]:
    return np.dtype([("end", "<u8"), ("crc", "<u4", (draws,))])


def checksum(codes: np.ndarray, caption: bytes) -> int:
    """CRC-32 of codes, uint16 [h, w] in one piece, and the caption."""
    return zlib.crc32(caption, zlib.crc32(codes.data))


def write_shard(folder: Path, codes: np.ndarray, captions: list[str]) -> None:
    """Write codes, uint16 [n, draws, h, w], and their n captions to the folder of a shard."""
    index = np.empty(len(captions), index_type(codes.shape[1]))
    end = 0
    with (folder / CAPTIONS).open("wb") as file:
        for row, caption in enumerate(captions):
            text = caption.encode()
            end += file.write(text)
            index[row] = end, [checksum(draw, text) for draw in codes[row]]
            end += file.write(b"\n")
    np.save(folder / CODES, codes)
    np.save(folder / INDEX, index)


class EncodedPairs:
    """Codes and captions by index, read from disk when asked for; each read is checked by its CRC-32.

    Each image has the codes of ``draws`` random augmentations: ``pairs[i]`` is the first, :meth:`seen_in` takes turns.

    Raises:
        ValueError: the folder is something else or not finished, or a file of it is missing or of another size; when a
            pair is read, it is not what was written. The message names the shard.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = folder = Path(folder)
        try:
            meta = json.loads((folder / META).read_text())
            if meta["format"] != FORMAT:
                raise ValueError(f"got the format {meta['format']}, expected {FORMAT}")
            self.fingerprint: str = meta["fingerprint"]
            self.source: str | None = meta.get("source")  # hash of the pairs that were encoded
            self.grid: tuple[int, int] = tuple(meta["grid"])
            self.draws: int = meta["draws"]
            self.skipped_count: int = meta["skipped"]  # images left out, named in skipped.jsonl
            self._names = [shard["name"] for shard in meta["shards"]]
            self._ends = list(itertools.accumulate(shard["count"] for shard in meta["shards"]))
            self._sizes: list[dict[str, int]] = [shard["bytes"] for shard in meta["shards"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            unfinished = " of a finished encoding" if (folder / "settings.json").is_file() else ""
            raise ValueError(
                f"encoded pairs: expected a folder with {META}{unfinished}, got {folder} ({error})"
            ) from None
        for name, sizes in zip(self._names, self._sizes, strict=True):
            for file, size in sizes.items():
                path = folder / name / file
                got = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
                if got != f"{size} bytes":
                    raise ValueError(f"encoded pairs: expected {size} bytes in {path}, got {got}")
        self._shards: dict[int, _Shard] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> EncodedPair:
        return self.seen_in(0, index)

    def seen_in(self, epoch: int, index: int) -> EncodedPair:
        """The pair as an epoch sees it: with the codes of another augmentation each time, in turn."""
        number, row = self._place(index)
        draw = epoch % self.draws
        shard = self._shards.get(number) or self._open(number)
        codes, text = shard.codes[row, draw], _caption(shard, row)
        if checksum(codes, text) != shard.checksums[row, draw]:
            path = self._folder / self._names[number]
            raise ValueError(
                f"encoded pairs: expected {path} as it was written, got other bytes in its sample {row}; "
                "delete this shard and encode again, which makes no other one"
            )
        return EncodedPair(codes.astype(np.int64), text.decode())

    def captions(self) -> Iterator[str]:
        """All captions in order."""
        for index in range(len(self)):
            yield self[index].caption

    def __reduce__(self) -> Any:  # the maps stay with their process
        return EncodedPairs, (self._folder,)

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of a pair, and its row in it."""
        check_index(index, len(self))
        number = bisect.bisect_right(self._ends, index)
        return number, index - self._ends[number - 1] if number else index

    def _open(self, number: int) -> _Shard:
        """Map the files of a shard."""
        count = self._ends[number] - (self._ends[number - 1] if number else 0)

        def rows(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
            size = count * int(np.prod(shape)) * dtype.itemsize
            return self._map(number, name)[-size:].view(dtype).reshape(count, *shape)  # after the header

        index = rows(INDEX, index_type(self.draws), ())
        codes = rows(CODES, np.dtype("<u2"), (self.draws, *self.grid))
        shard = _Shard(codes, self._map(number, CAPTIONS).data, index["end"], index["crc"])
        self._shards[number] = shard
        return shard

    def _map(self, number: int, name: str) -> np.ndarray:
        """The bytes of a file, uint8, mapped into memory.

        Unlike numpy's maps these hold no file open: there may be more shards than a process may open files.
        """
        path, size = self._folder / self._names[number] / name, self._sizes[number][name]
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()


def _caption(shard: _Shard, row: int) -> bytes:
    begin = int(shard.ends[row - 1]) + 1 if row else 0
    return bytes(shard.text[begin : int(shard.ends[row])])
