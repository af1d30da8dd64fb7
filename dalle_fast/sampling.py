"""Around the draw of a token: the check of all its options, guidance, and draws that a generator seeds."""

from __future__ import annotations

import math

import torch

from . import ops
from .ops.sample import check_options as check_draw


def check_options(temperature: float, top_k: int | None, top_p: float | None, guidance: float) -> None:
    """Raise ValueError for a value that no sampling can be done with."""
    check_draw(temperature, top_k, top_p)
    if not math.isfinite(guidance):
        raise ValueError(f"guidance: expected a finite number, got {guidance}")


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
    """``ops.sample`` with a seed from the generator: [C, K] -> int64 [C]. The input stays as it was."""
    seed = torch.randint(2**63 - 1, (), generator=generator)
    return ops.sample(logits.float(), seed, temperature, top_k, top_p)
