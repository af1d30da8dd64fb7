"""A shuffle of any size that is computed, not stored."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 6  # an even number: see _feistel


def shuffled(indices: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The places of ``indices`` in a permutation of ``range(n)``, another one for each (seed, epoch).

    A Feistel network permutes the next power of two; cycle walking, that is repeating it until the result is below
    ``n`` (at most twice on average), makes that a permutation of ``range(n)``, which takes no memory.

    Args:
        indices: integers from 0 to n - 1, of any shape.

    Returns:
        int64, of the same shape.
    """
    if n < 1 or np.any(indices < 0) or np.any(indices >= n):
        raise ValueError(f"indices: expected 0 to {n - 1}, got {np.min(indices)} to {np.max(indices)}")
    keys = round_keys(seed, epoch)
    result = _feistel(indices.astype(np.uint64), n, keys)
    while (outside := result >= n).any():
        result[outside] = _feistel(result[outside], n, keys)
    return result.astype(np.int64)


def round_keys(seed: int, epoch: int) -> np.ndarray:
    """One uint64 per round."""
    digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def _feistel(values: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of the numbers of as many bits as ``n - 1`` has (at least 2), uint64."""
    bits = max(2, (n - 1).bit_length())
    low = np.uint64(bits // 2)
    masks = [(np.uint64(1) << width) - np.uint64(1) for width in (np.uint64(bits) - low, low)]
    left, right = values >> low, values & masks[1]
    for i, key in enumerate(keys):  # the halves swap each round, and with them their widths
        left, right = right, left ^ (mixed(right + key) & masks[i % 2])
    return left << low | right


def mixed(x: np.ndarray) -> np.ndarray:
    """A bijective hash of each uint64: the finalizer of MurmurHash3."""
    x = (x ^ x >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ x >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ x >> np.uint64(33)
