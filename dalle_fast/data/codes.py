"""Image codes and captions on disk: what the transformer trains on when images are encoded once.

The folder that :func:`dalle_fast.data.encode.encode_pairs` writes holds ``shard-00000``, ``shard-00001``, ...:

- ``codes.npy``: uint16 [n, draws, h, w], the codes of each image in each of its random augmentations ("draws");
- ``captions.txt``: UTF-8, each caption followed by a newline; where an image has several, a unit separator (0x1f) is
  between them;
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

from .pairs import SEPARATOR, check_index

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

    Each image has the codes of ``draws`` random augmentations, and one or more captions: ``pairs[i]`` is the first of
    both, :meth:`seen_in` takes turns.

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
            self._check(meta)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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

    def _check(self, meta: dict[str, Any]) -> None:
        """Raise ValueError unless the numbers and names in ``meta.json`` can be those of an encoding."""
        counts = [shard["count"] for shard in meta["shards"]]
        sizes = [size for shard in self._sizes for size in shard.values()]
        numbers = [self.draws, *self.grid, self.skipped_count, *counts, *sizes, meta["pairs"], meta["shard_size"]]
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError("got sizes that are no integers of 0 or more")
        if not isinstance(self.fingerprint, str) or len(self.grid) != 2 or min(self.draws, *self.grid) < 1:
            raise ValueError(f"got fingerprint {self.fingerprint!r}, grid {self.grid}, {self.draws} draws")
        shards = -(-meta["pairs"] // max(1, meta["shard_size"]))
        if len(self._names) != shards or any(name != f"shard-{i:05d}" for i, name in enumerate(self._names)):
            raise ValueError(f"expected shards 0 to {shards - 1}, got {len(self._names)}, or other names")
        if any(set(shard) != {CODES, CAPTIONS, INDEX} for shard in self._sizes) or sum(counts) < 1:
            raise ValueError("expected files of codes, captions and index in all shards, and at least one image")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> EncodedPair:
        return self.seen_in(0, index)

    def seen_in(self, epoch: int, index: int) -> EncodedPair:
        """The pair as an epoch sees it: with the codes of another augmentation, and another caption, in turn."""
        codes, text = self._read(index, epoch % self.draws)
        captions = text.split(SEPARATOR)
        return EncodedPair(codes.astype(np.int64), captions[epoch % len(captions)])

    def _read(self, index: int, draw: int) -> tuple[np.ndarray, str]:
        """The codes of a pair in a draw, and its captions. Raises ValueError if they are damaged."""
        number, row = self._place(index)
        shard = self._shards.get(number) or self._open(number)
        codes, text = shard.codes[row, draw], _caption(shard, row)
        if checksum(codes, text) != shard.checksums[row, draw]:
            path = self._folder / self._names[number]
            raise ValueError(
                f"encoded pairs: expected {path} as it was written, got other bytes in its sample {row}; "
                "delete this shard and encode again, which makes no other one"
            )
        return codes, text.decode()

    def captions(self) -> Iterator[str]:
        """All captions in order, one after the other where an image has several."""
        for index in range(len(self)):
            yield from self._read(index, 0)[1].split(SEPARATOR)

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
            path = self._folder / self._names[number] / name
            if _header_of(path) != (dtype, (count, *shape), self._sizes[number][name] - size):
                raise ValueError(f"encoded pairs: expected {dtype} {[count, *shape]} in {path}, got another header")
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


def _header_of(path: Path) -> tuple[np.dtype[Any], tuple[int, ...], int] | None:
    """Type and shape of an array in C order, and the length of its header, in a file of numpy; None if damaged."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            return None if fortran else (dtype, shape, file.tell())
    except OSError:
        raise
    except Exception:  # on damaged bytes numpy raises nearly anything
        return None


def _caption(shard: _Shard, row: int) -> bytes:
    begin = int(shard.ends[row - 1]) + 1 if row else 0
    return bytes(shard.text[begin : int(shard.ends[row])])
