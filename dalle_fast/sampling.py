"""From logits to a token: temperature, top-k, top-p, guidance and the draw. Small pure functions, no host read."""

from __future__ import annotations

import math

import torch


def check_options(temperature: float, top_k: int | None, top_p: float | None, guidance: float) -> None:
    """Raise ValueError for a value that no sampling can be done with."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a finite number above 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected 1 or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a share in (0, 1], got {top_p}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance: expected a finite number, got {guidance}")


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Minus infinity for all but the k largest of [C, K]; ties with the k-th stay."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Minus infinity for all but the smallest set of [C, K] whose probabilities reach p; never empty."""
    ordered, order = logits.sort(descending=True, dim=-1)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # what the likelier tokens add up to
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, -torch.inf)


def guide(logits: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance: [2 C, K], with the caption and then without it -> [C, K]."""
    with_caption, without = logits.chunk(2)
    return without + guidance * (with_caption - without)


def sample(
    logits: torch.Tensor,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """One draw a row: [C, K] -> int64 [C]. The input stays as it was.

    Each probability is divided by exponential noise and the largest wins, which draws from the distribution without
    the host read of ``torch.multinomial``.
    """
    logits = logits.float() / temperature
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1)
