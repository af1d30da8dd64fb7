"""Encode the images of a source once, in several augmentation draws, into the folder that ``EncodedPairs`` reads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..files import write_atomically
from .augment import augment_dalle, center_crop_resize
from .codes import CAPTIONS, CODES, FORMAT, INDEX, META, EncodedPairs, write_shard
from .pairs import Pairs
from .shard_job import (
    SKIPPED,
    Settings,
    Shard,
    process_in_shards,
    read_skipped,
    shard_folder,
    write_skipped,
)
from .sources.view import fingerprint_of

SHARD_SIZE = 32_768  # pictures; 67 MB a draw of codes 32 x 32


@dataclass(frozen=True, kw_only=True)
class Encoding(Settings):
    """What decides the codes."""

    grid: tuple[int, int]
    draws: int
    seed: int


def encode_pairs(
    folder: str | Path,
    pairs: Pairs,
    encode: Callable[[torch.Tensor], torch.Tensor],
    image_size: int,
    grid: tuple[int, int],
    fingerprint: str,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
    shard_size: int = SHARD_SIZE,
) -> EncodedPairs | None:
    """Encode every image; a run that was killed goes on at the first shard that is missing, to the same bytes.

    Args:
        folder: a new one, or that of the same encoding.
        encode: float images [B, 3, S, S] in [0, 1] to codes, integers [B, h, w] from 0 to 65535.
        image_size: S.
        grid: h and w.
        fingerprint: which dVAE encodes.
        draws: 1 takes the central square of a picture; more are that many augmentation draws of it (listing 2 of the
            paper), drawn from (seed, index of the pair, draw).
        batch_size: images encoded together, where a picture's draws always are.
        workers, rank, ranks: as in ``process_in_shards``.
        shard_size: pictures of a shard.

    Returns:
        the pairs, or None while other processes are still at work.

    Raises:
        ValueError: the folder holds something else, no image can be read, or the codes do not fit.
    """
    for name, value in (("draws", draws), ("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    folder = Path(folder)
    settings = Encoding(
        fingerprint=fingerprint,
        source=fingerprint_of(pairs),
        pairs=len(pairs),
        image_size=image_size,
        shard_size=shard_size,
        grid=grid,
        draws=draws,
        seed=seed,
    )

    def codes_of(images: torch.Tensor) -> torch.Tensor:
        codes = encode(images)
        if codes.shape[1:] != grid or codes.dtype.is_floating_point:
            raise ValueError(f"codes: expected integers [B, {grid[0]}, {grid[1]}], got {codes.dtype} {[*codes.shape]}")
        if codes.min() < 0 or codes.max() > 65535:
            raise ValueError(f"codes: expected 0 to 65535, got {codes.min()} to {codes.max()}")
        return codes

    def save(folder: Path, shard: Shard) -> None:
        codes = shard.values.astype("<u2").reshape(-1, draws, *grid)  # of no picture, where all are broken
        write_shard(folder, codes, shard.captions)

    prepare = partial(_draws, size=image_size, draws=draws, seed=seed)
    together = max(1, batch_size // draws)
    if not process_in_shards(folder, pairs, settings, prepare, codes_of, save, together, workers, rank, ranks):
        return None
    _finish(folder, settings, pairs)
    return EncodedPairs(folder)


def _draws(image: np.ndarray, index: int, size: int, draws: int, seed: int) -> np.ndarray:
    """The images to encode of a picture, uint8 [draws, size, size, 3]."""
    if draws == 1:
        return center_crop_resize(image, size)[None]
    generators = (np.random.default_rng((seed, index, draw)) for draw in range(draws))
    return np.stack([augment_dalle(image, size, rng) for rng in generators])


def _finish(folder: Path, settings: Encoding, pairs: Pairs) -> None:
    """Write what belongs to all shards."""
    shards: list[dict[str, Any]] = []
    for number in range(-(-settings.pairs // settings.shard_size)):
        path = shard_folder(folder, number)
        count = len(np.load(path / INDEX, mmap_mode="r"))
        sizes = {name: (path / name).stat().st_size for name in (CODES, CAPTIONS, INDEX)}
        shards.append({"name": path.name, "count": count, "bytes": sizes})
    if not any(shard["count"] for shard in shards):
        raise ValueError(f"pairs: expected at least one readable image, got none; {folder} names them")
    everything = itertools.chain(pairs.skipped, read_skipped(folder, len(shards)))
    skipped = write_skipped(folder / SKIPPED, everything)
    meta = {"format": FORMAT, **asdict(settings), "skipped": skipped, "shards": shards}
    write_atomically(folder / META, json.dumps(meta, indent=1) + "\n")
