"""Inputs of the op tests, and the checks that every op passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

HALVES = [torch.bfloat16, torch.float16]


def normal(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard normal numbers, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def surrounded(x: torch.Tensor, pad: int = 2, step: int = 1, order: Sequence[int] | None = None) -> torch.Tensor:
    """The values of x as a view into a larger buffer of NaN.

    Args:
        pad: elements of NaN at both ends of each dimension.
        step: distance of elements in the innermost dimension of memory.
        order: dimensions from the outermost in memory to the innermost; as they are by default.
    """
    order = range(x.dim()) if order is None else order
    sizes = [x.shape[dim] for dim in order]
    sizes[-1] *= step
    buffer = torch.full([size + 2 * pad for size in sizes], torch.nan, dtype=x.dtype, device=x.device)
    inside = [slice(pad, pad + size) for size in sizes]
    inside[-1] = slice(pad, pad + sizes[-1], step)
    view = buffer[tuple(inside)].permute([list(order).index(dim) for dim in range(x.dim())])
    return view.copy_(x)


def surrounded_in_memory(x: torch.Tensor, pad: int = 1) -> torch.Tensor:
    """The values of x, contiguous, between elements of NaN: they start at no multiple of the size of a vector."""
    buffer = torch.full((x.numel() + 2 * pad,), torch.nan, dtype=x.dtype, device=x.device)
    return buffer[pad : pad + x.numel()].view(x.shape).copy_(x)


def is_nan_around(view: torch.Tensor) -> bool:
    """Whether nothing was written around a view from ``surrounded``; inside are numbers."""
    buffer = view._base
    return bool(buffer.isnan().sum() == buffer.numel() - view.numel())


def assert_equal(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """The same bits, tensor by tensor; NaN equals nothing."""
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)


def same_on_any_number_of_threads(run: Callable[[], Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
    """The results of ``run``, after the check that they are the same bits every time and on 1, 2 and 3 threads."""
    first = run()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            assert_equal(run(), first)
    finally:
        torch.set_num_threads(threads)
    return first
