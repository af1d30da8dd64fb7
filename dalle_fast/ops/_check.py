"""Checks of arguments, shared by the ops. Messages read "name: expected X, got Y"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def check_tensor(
    name: str,
    x: Tensor,
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    shape: Sequence[int | str] | None = None,
    device: torch.device | None = None,
) -> None:
    """Check that x is a tensor of one of the dtypes, in the shape and on the device, if given.

    Args:
        shape: sizes; a letter stands for any size from 1.

    Raises:
        TypeError: x is no tensor, or of another dtype.
        ValueError: another shape or device.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    allowed = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if x.dtype not in allowed:
        raise TypeError(f"{name}: expected {' or '.join(map(str, allowed))}, got {x.dtype}")
    if shape is not None and x.shape != shape and not _fits(x.shape, shape):
        non_empty = "a non-empty " if 0 in x.shape else ""
        raise ValueError(f"{name}: expected {non_empty}[{', '.join(map(str, shape))}], got {list(x.shape)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")


def check_elements(name: str, x: Tensor | None, dtype: torch.dtype, n: int, device: torch.device) -> None:
    """Check that x is None, or a tensor of n elements in any shape; raises as :func:`check_tensor`."""
    if x is None:
        return
    check_tensor(name, x, dtype, device=device)
    if x.numel() != n:
        raise ValueError(f"{name}: expected {n} element(s), got {list(x.shape)}")


def int64_scalar(name: str, value: int | Tensor, device: torch.device) -> Tensor:
    """An int, or an int64 tensor of one element, as a scalar on the device.

    Raises:
        TypeError: neither of the two.
        ValueError: an int beyond 64 bits.
    """
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1:
            raise TypeError(f"{name}: expected an int64 tensor of one element, got {value.dtype} {list(value.shape)}")
        return value.reshape(()).to(device)
    if not isinstance(value, int):
        raise TypeError(f"{name}: expected an int or an int64 tensor, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected 64 bits with a sign, got {value}")
    return torch.full((), value, dtype=torch.int64, device=device)  # filled there: a copy would wait for the device


def _fits(sizes: Sequence[int], shape: Sequence[int | str]) -> bool:
    return len(sizes) == len(shape) and all(
        size > 0 if isinstance(wanted, str) else size == wanted for size, wanted in zip(sizes, shape, strict=True)
    )
