"""AdamW with 16-bit moments (section 2.4, appendix D)."""

from __future__ import annotations

import torch

from ._library import kernels_loaded, reference_op


@torch.no_grad()
def adamw16(
    param: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW update in place, moments kept in 16 bits (section 2.4, appendix D).

    Args:
        param: any shape, float32, contiguous or channels_last; updated.
        grad: the shape of param, float32. Must be finite: a NaN would be stored as the largest moment.
        mean: running mean, int16 bit patterns of 1-6-9 in the shape and strides of param; zeros at first; updated.
        variance: running mean of the squares, likewise in 0-6-10, clipped to 5; updated.
        step: number of this update, from 1.
        lr, beta1, beta2, eps, weight_decay: as in ``torch.optim.AdamW``.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a tensor of another shape or memory layout, or a number out of range.
    """
    if not (param.is_contiguous() or (param.dim() == 4 and param.is_contiguous(memory_format=torch.channels_last))):
        raise ValueError(f"param: expected contiguous or channels_last memory, got strides {param.stride()}")
    for name, tensor, dtype in (
        ("param", param, torch.float32),
        ("grad", grad, torch.float32),
        ("mean", mean, torch.int16),
        ("variance", variance, torch.int16),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if tensor.shape != param.shape:
            raise ValueError(f"{name}: expected {list(param.shape)}, got {list(tensor.shape)}")
        if name != "grad" and tensor.stride() != param.stride():
            raise ValueError(f"{name}: expected the strides of param {param.stride()}, got {tensor.stride()}")
    if step < 1:
        raise ValueError(f"step: expected at least 1, got {step}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: expected a number in [0, 1), got {beta}")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {value}")
    if reference := reference_op("adamw16", param.device):
        return reference(param, grad, mean, variance, step, lr, beta1, beta2, eps, weight_decay)
    if grad.stride() != param.stride():
        grad = torch.empty_like(param).copy_(grad)
    torch.ops.dalle_fast.adamw16(param, grad, mean, variance, step, lr, beta1, beta2, eps, weight_decay)


if kernels_loaded():

    @torch.library.register_fake("dalle_fast::adamw16")
    def _adamw16_fake(
        param: torch.Tensor,
        grad: torch.Tensor,
        mean: torch.Tensor,
        variance: torch.Tensor,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> None:
        return None
