"""Sampling: from logits to one code per row, with temperature, top-k and top-p, from a seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._check import HALVES, check_tensor, int64_scalar
from ._library import reference_op, register_fake


def sample(
    logits: Tensor,
    seed: int | Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    first: int | Tensor = 0,
    pitch: int | None = None,
) -> Tensor:
    """One draw from the softmax of each row: the argmax of logits / temperature plus Gumbel noise (Gumbel-max).

    A pure function of its arguments: the noise of row c, code i is element ``first + c * pitch + i`` of the seed's
    stream. With ``first = step * K`` and ``pitch = steps * K``, a candidate's draws over a whole image do not depend on
    the number of candidates.

    Args:
        logits: [C, K], float32, bfloat16 or float16. Each row needs a finite largest value; -inf is never drawn.
        seed: an int, or an int64 tensor of one element, best on the device of logits, where nothing waits for it.
        temperature: divides the logits; below 1 the likeliest codes gain.
        top_k: draw from the k largest logits and those equal to the k-th; None for all.
        top_p: draw from the smallest set of likeliest codes, after temperature and top_k, whose probabilities reach
            this share; of equal logits the first ones. None for all.
        first, pitch: place of the noise in the seed's stream: first is an int or a tensor, as seed; the pitch is K by
            default, and at least K; first + C * pitch stays below 2^63.

    Returns:
        int64 [C]. On CUDA, where nothing waits for the result, -1 for a row with NaN or without a finite largest value.

    Raises:
        TypeError: an argument of another type or dtype.
        ValueError: logits of another rank or empty, an option out of range.
        RuntimeError: on the CPU a row with NaN or without a finite largest value, or a tensor ``first`` out of range;
            this install has no kernel for the device.
    """
    _check_options(temperature, top_k, top_p)
    check_tensor("logits", logits, (torch.float32, *HALVES), ("C", "K"))
    rows, codes = logits.shape
    pitch = codes if pitch is None else pitch
    least = first if isinstance(first, int) else 0
    if least < 0 or pitch < codes:
        raise ValueError(f"first and pitch: expected 0 or more and {codes} or more, got {first} and {pitch}")
    if least + rows * pitch >= 2**63:
        raise ValueError(f"first and pitch: expected first + {rows} * pitch below 2^63, got {first} and {pitch}")
    seed, first = int64_scalar("seed", seed, logits.device), int64_scalar("first", first, logits.device)
    if reference := reference_op("sample", logits.device):
        return reference(logits, seed, temperature, top_k, top_p, first, pitch)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return torch.ops.dalle_fast.sample(
        logits, seed, first, float(temperature), codes if top_k is None else top_k, top_p or 1.0, pitch
    )


@register_fake("sample")
def _sample_fake(
    logits: Tensor, seed: Tensor, first: Tensor, temperature: float, top_k: int, top_p: float, pitch: int
) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


def _check_options(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError for an option of :func:`sample` that is out of range."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected 1 or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a share in (0, 1], got {top_p}")
