"""Image codes and captions on disk: what the transformer trains on when images are encoded once.

A folder of ``codes-00000.npy``, ... (uint16 [n, h, w], 65,536 samples each), ``captions.jsonl`` (a JSON string per
line) and ``meta.json`` (count, grid, the dVAE's fingerprint, the SHA-256 of every file).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .folders import new_folder

SHARD_SIZE = 65536
_FORMAT = "dalle_fast.encoded"
_CAPTIONS = "captions.jsonl"


class EncodedPair(NamedTuple):
    """Image codes, int64 [h, w], and the caption."""

    codes: np.ndarray
    caption: str


def write_encoded(folder: str | Path, samples: Iterable[tuple[np.ndarray, str]], fingerprint: str) -> int:
    """Write the samples to a new folder, atomically.

    Args:
        samples: codes, integers [h, w] from 0 to 65535, and caption; all of one grid.
        fingerprint: which dVAE the codes are from.

    Returns:
        the number of samples.

    Raises:
        ValueError: the folder is not new, there are no samples, or codes do not fit.
    """
    with new_folder(folder) as partial:
        shard: list[np.ndarray] = []
        names: list[str] = []
        grid: tuple[int, ...] = ()
        count = 0

        def write_shard() -> None:
            names.append(f"codes-{len(names):05d}.npy")
            np.save(partial / names[-1], np.stack(shard))
            shard.clear()

        with (partial / _CAPTIONS).open("w", encoding="utf-8") as captions:
            for codes, caption in samples:
                grid = grid or codes.shape
                if codes.ndim != 2 or codes.shape != grid or codes.dtype.kind not in "iu":
                    raise ValueError(
                        f"codes: expected integers {list(grid) if len(grid) == 2 else '[h, w]'}, "
                        f"got {codes.dtype} {list(codes.shape)}"
                    )
                if codes.min() < 0 or codes.max() > 65535:
                    raise ValueError(f"codes: expected 0 to 65535, got {codes.min()} to {codes.max()}")
                shard.append(codes.astype(np.uint16))
                captions.write(json.dumps(caption) + "\n")
                count += 1
                if len(shard) == SHARD_SIZE:
                    write_shard()
            if shard:
                write_shard()
        if not count:
            raise ValueError("samples: expected at least one, got none")
        meta = {
            "format": _FORMAT,
            "fingerprint": fingerprint,
            "grid": list(grid),
            "count": count,
            "sha256": {name: sha256_of(partial / name) for name in [*names, _CAPTIONS]},
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return count


class EncodedPairs:
    """What :func:`write_encoded` wrote, by index; codes are read as they are asked for.

    Raises:
        ValueError: the folder is something else, or a file is missing, truncated or changed (all are hashed).
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text())
            if meta["format"] != _FORMAT:
                raise ValueError(f"got the format {meta['format']}")
            self.fingerprint: str = meta["fingerprint"]
            self.grid: tuple[int, int] = tuple(meta["grid"])
            self._count: int = meta["count"]
            hashes: dict[str, str] = meta["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"encoded pairs: expected a folder with meta.json, got {folder} ({error})") from None
        for name, expected in hashes.items():
            if not (folder / name).is_file():
                raise ValueError(f"encoded pairs: expected {folder / name}, got no such file")
            if sha256_of(folder / name) != expected:
                raise ValueError(f"encoded pairs: expected {folder / name} as it was written, got a changed file")
        self._shards = [np.load(folder / name, mmap_mode="r") for name in sorted(hashes) if name != _CAPTIONS]
        self._captions = (folder / _CAPTIONS).read_bytes()
        self._line_ends = np.flatnonzero(np.frombuffer(self._captions, np.uint8) == ord("\n"))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> EncodedPair:
        if not 0 <= index < self._count:
            raise IndexError(f"index: expected 0 to {self._count - 1}, got {index}")
        shard, row = divmod(index, SHARD_SIZE)
        begin = self._line_ends[index - 1] + 1 if index else 0
        caption = json.loads(self._captions[begin : self._line_ends[index]])
        return EncodedPair(self._shards[shard][row].astype(np.int64), caption)


def sha256_of(path: Path) -> str:
    """The hash of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
