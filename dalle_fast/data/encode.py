"""Encode the images of a source once, in several random augmentations, into the folder that ``EncodedPairs`` reads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
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
    DEFAULTS,
    SKIPPED,
    JobOptions,
    JobSettings,
    Shard,
    process_in_shards,
    read_settings,
    read_skipped,
    shard_folders,
    write_skipped,
)


@dataclass(frozen=True, kw_only=True)
class Encoding(JobSettings):
    """All that decides the codes, beside the pairs.

    One draw is the central square of an image; more are as many random augmentations of it (listing 2 of the paper),
    each from a generator of (seed, index of the pair, draw).
    """

    grid: tuple[int, int]  # h and w of the codes
    draws: int = 1  # per image
    seed: int = 0
    shard_size: int = 32_768  # images; 67 MB per draw of 32 x 32 codes

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws < 1:
            raise ValueError(f"draws: expected 1 or more, got {self.draws}")
        if self.seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {self.seed}")


def encode_pairs(
    folder: str | Path,
    pairs: Pairs,
    encode: Callable[[torch.Tensor], torch.Tensor],
    encoding: Encoding,
    options: JobOptions = DEFAULTS,
) -> EncodedPairs | None:
    """Encode every image; a run that was killed goes on at the first shard that is missing, to the same bytes.

    Args:
        folder: a new one, or that of the same encoding.
        encode: float images [B, 3, S, S] in [0, 1] to codes, integers [B, h, w] from 0 to 65535.

    Returns:
        the pairs, or None while other processes are still at work.

    Raises:
        ValueError: the folder holds something else, no image can be read, or the codes do not fit.
    """
    folder, grid, draws = Path(folder), encoding.grid, encoding.draws

    def codes_of(images: torch.Tensor) -> torch.Tensor:
        codes = encode(images)
        if codes.shape[1:] != grid or codes.dtype.is_floating_point:
            raise ValueError(f"codes: expected integers [B, {grid[0]}, {grid[1]}], got {codes.dtype} {[*codes.shape]}")
        if codes.min() < 0 or codes.max() > 65535:
            raise ValueError(f"codes: expected 0 to 65535, got {codes.min()} to {codes.max()}")
        return codes

    def save(folder: Path, shard: Shard) -> None:
        codes = shard.values.astype("<u2").reshape(-1, draws, *grid)  # [0, draws, h, w] if all images are broken
        write_shard(folder, codes, shard.captions)

    prepare = partial(_draws, size=encoding.image_size, draws=draws, seed=encoding.seed)
    if not process_in_shards(folder, pairs, encoding, prepare, codes_of, save, draws, options):
        return None
    _finish(folder, pairs)
    return EncodedPairs(folder)


def _draws(image: np.ndarray, index: int, size: int, draws: int, seed: int) -> np.ndarray:
    """The images to encode for one image of the source, uint8 [draws, size, size, 3]."""
    if draws == 1:
        return center_crop_resize(image, size)[None]
    generators = (np.random.default_rng((seed, index, draw)) for draw in range(draws))
    return np.stack([augment_dalle(image, size, rng) for rng in generators])


def _finish(folder: Path, pairs: Pairs) -> None:
    """Write the files that describe all shards."""
    shards: list[dict[str, Any]] = []
    for path in shard_folders(folder):
        try:
            count = len(np.load(path / INDEX, mmap_mode="r"))
        except Exception as error:  # on damaged bytes numpy raises nearly anything
            raise ValueError(
                f"{path}: expected a shard as it was written, got {type(error).__name__}: {error}; "
                "delete it and encode again, which makes no other one"
            ) from None
        sizes = {name: (path / name).stat().st_size for name in (CODES, CAPTIONS, INDEX)}
        shards.append({"name": path.name, "count": count, "bytes": sizes})
    if not any(shard["count"] for shard in shards):
        raise ValueError(f"pairs: expected at least one readable image, got none; {folder} names them")
    skipped = write_skipped(folder / SKIPPED, itertools.chain(pairs.skipped, read_skipped(folder)))
    meta = {"format": FORMAT, **read_settings(folder), "skipped": skipped, "shards": shards}
    write_atomically(folder / META, json.dumps(meta, indent=1) + "\n")
