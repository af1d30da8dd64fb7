"""Tolerances, relative to the largest value of the float64 result. Masks, codes and noise are exact."""

from __future__ import annotations

import torch

FORWARD = 1e-5  # float32 against the float64 reference
GRADIENT = 1e-4
HALF = 2.0  # a 16-bit result may be this many times as far from float64 as the same reference in 16 bits


def error(result: torch.Tensor, exact: torch.Tensor, least: float = 0.1) -> float:
    """Largest difference over largest value, or over ``least``: inputs are of size 1, so a zero may be off by 1e-6."""
    return ((result.double() - exact).abs().max() / exact.abs().max().clamp(min=least)).item()
