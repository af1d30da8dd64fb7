"""Crops and resizes of training images: listings 1 and 2 of the paper (appendices A.2 and B.2).

Images are uint8 [H, W, 3] of any size; results are uint8 [size, size, 3]. A short side below ``size`` is enlarged to
it; an image that is already ``size x size`` is not resampled.
"""

from __future__ import annotations

import numpy as np

from .._host import area_resize


def augment_dvae(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Listing 1, for the dVAE: random square crop, resize to 9/8 to 12/8 of ``size``, random crop, random flip."""
    _check(image, size)
    height, width = image.shape[:2]
    side = min(height, width)
    image = _crop(image, rng.integers(height - side + 1), rng.integers(width - side + 1), side)
    image = _resize(image, rng.integers(min(side, round(9 / 8 * size)), min(side, round(12 / 8 * size)) + 1), size)
    image = _random_crop(image, size, rng)
    return np.ascontiguousarray(image[:, ::-1] if rng.random() < 0.5 else image)


def augment_dalle(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Listing 2, for the transformer: near-centre square crop, resize to 1 to 9/8 of ``size``, random crop.

    No flip: an image may hold text, a caption may say left or right.
    """
    _check(image, size)
    height, width = image.shape[:2]
    side = min(height, width)
    image = _crop(image, _near_centre(height - side, rng), _near_centre(width - side, rng), side)
    image = _resize(image, rng.integers(size, max(size, min(side, round(9 / 8 * size))) + 1), size)
    return np.ascontiguousarray(_random_crop(image, size, rng))


def center_crop_resize(image: np.ndarray, size: int) -> np.ndarray:
    """The central square, resized: for encoding and validation."""
    _check(image, size)
    height, width = image.shape[:2]
    side = min(height, width)
    return np.ascontiguousarray(_resize(_crop(image, (height - side) // 2, (width - side) // 2, side), size, size))


def _check(image: np.ndarray, size: int) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    if size < 1:
        raise ValueError(f"size: expected 1 or more, got {size}")


def _near_centre(slack: int, rng: np.random.Generator) -> int:
    """A random offset from 3/8 to 5/8 of the slack, the upper end excluded unless it is the only one."""
    low = 3 * slack // 8
    return int(rng.integers(low, max(low + 1, 5 * slack // 8)))


def _crop(image: np.ndarray, top: int, left: int, side: int) -> np.ndarray:
    return image[top : top + side, left : left + side]


def _random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    slack = image.shape[0] - size
    return _crop(image, rng.integers(slack + 1), rng.integers(slack + 1), size)


def _resize(image: np.ndarray, side: int, least: int) -> np.ndarray:
    """A square image resized to ``side``, but at least to ``least``."""
    side = max(int(side), least)
    return image if side == image.shape[0] else area_resize(image, side, side)
