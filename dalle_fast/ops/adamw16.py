"""AdamW with 16-bit moments (section 2.4, appendix D), and the norm of all gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._check import check_elements, check_tensor
from ._library import reference_op, register_fake


@torch.no_grad()
def adamw16(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    step: int | Tensor,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | Tensor,
    unscale: Tensor | None = None,
    clip: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """One AdamW step of n parameters in place, moments kept in 16 bits (section 2.4, appendix D).

    On CUDA one launch updates all parameters (784 at a time) and nothing is read back on the host. Values that change
    between steps can be tensors, so that a captured CUDA graph can be replayed.

    Args:
        params: n tensors of any shapes on one device, float32, contiguous or channels_last; updated.
        grads: float32 in the shapes of params. Must be finite where not skipped: a NaN would be stored as the largest
            moment.
        means: running means, int16 bit patterns of 1-6-9 in the shapes and strides of params; zeros at first; updated.
        variances: running means of the squares, likewise in 0-6-10, clipped to 5; updated.
        step: number of this step, from 1; or one int64 on the device.
        lr: learning rate; or one float32 on the device.
        beta1, beta2, eps: as in ``torch.optim.AdamW``.
        weight_decay: as in ``torch.optim.AdamW``; or [n] float32, one for each parameter.
        unscale: [n] float32, factor on each gradient: 1 over the scale of its resblock.
        clip: one float32, factor on every gradient, such as the limit over :func:`gradient_norm`.
        skip: [n] bool, True for parameters that stay as they are, moments included.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a tensor of another shape, memory layout or device, or a number out of range.
        RuntimeError: tensors to be updated that overlap in memory; this install has no kernel for the device.
    """
    n = len(params)
    for name, tensors in (("grads", grads), ("means", means), ("variances", variances)):
        if len(tensors) != n:
            raise ValueError(f"{name}: expected {n} tensors, as many as params, got {len(tensors)}")
    if n == 0:
        return
    _check_parameters(params, grads, means, variances)
    device = params[0].device
    if not isinstance(step, Tensor) and step < 1:
        raise ValueError(f"step: expected at least 1, got {step}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: expected a number in [0, 1), got {beta}")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {value}")
    step = _on_device("step", step, torch.int64, 1, device)
    lr = _on_device("lr", lr, torch.float32, 1, device)
    weight_decay = _on_device("weight_decay", weight_decay, torch.float32, n, device)
    check_elements("unscale", unscale, torch.float32, n, device)
    check_elements("clip", clip, torch.float32, 1, device)
    check_elements("skip", skip, torch.bool, n, device)
    arguments = (step, lr, beta1, beta2, eps, weight_decay, unscale, clip, skip)
    if reference := reference_op("adamw16", device):
        return reference(params, grads, means, variances, *arguments)
    grads = [
        grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)
        for param, grad in zip(params, grads, strict=True)
    ]
    torch.ops.dalle_fast.adamw16(params, grads, means, variances, *arguments)


@register_fake("adamw16")
def _adamw16_fake(
    params: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: Tensor,
    unscale: Tensor | None,
    clip: Tensor | None,
    skip: Tensor | None,
) -> None:
    return None


def _check_parameters(
    params: Sequence[Tensor], grads: Sequence[Tensor], means: Sequence[Tensor], variances: Sequence[Tensor]
) -> None:
    device = params[0].device
    for i, param in enumerate(params):
        check_tensor(f"params[{i}]", param, torch.float32, device=device)
        if not (param.is_contiguous() or _is_channels_last(param)):
            raise ValueError(f"params[{i}]: expected contiguous or channels_last memory, got strides {param.stride()}")
        check_tensor(f"grads[{i}]", grads[i], torch.float32, param.shape, device)
        for name, moment in (("means", means[i]), ("variances", variances[i])):
            check_tensor(f"{name}[{i}]", moment, torch.int16, param.shape, device)
            if moment.stride() != param.stride() and _layout(moment) != _layout(param):
                raise ValueError(f"{name}[{i}]: expected the strides of params {param.stride()}, got {moment.stride()}")


def _layout(x: Tensor) -> list[int]:
    """The strides of dimensions of more than one element; those of others carry no meaning."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel()]


def _on_device(name: str, x: float | Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> Tensor:
    if not isinstance(x, Tensor):
        return torch.full((numel,), x, dtype=dtype, device=device)
    check_elements(name, x, dtype, numel, device)
    return x


@torch.no_grad()
def gradient_norm(
    grads: Sequence[Tensor], unscale: Tensor | None = None, skip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Euclidean norm of all gradients together, and the parameters that the step must skip.

    A gradient that is not finite is left out of the norm, and its parameter skipped. Nothing is read back on the host.

    Args:
        grads: n tensors, at least one, of any shapes on one device, float32.
        unscale: [n] float32, factor on each gradient.
        skip: [n] bool, True for parameters that are skipped anyway.

    Returns:
        The norm, [] float32, and [n] bool: ``skip``, and True where a gradient is not finite. Both on the device of
        grads, as :func:`adamw16` takes them::

            norm, skip = gradient_norm(grads, unscale)
            adamw16(..., unscale=unscale, clip=(limit / norm).clamp(max=1), skip=skip)

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: no gradients, or a tensor of another shape or device.
    """
    if not grads:
        raise ValueError("grads: expected at least one tensor, got none")
    device = grads[0].device
    for i, grad in enumerate(grads):
        check_tensor(f"grads[{i}]", grad, torch.float32, device=device)
    check_elements("unscale", unscale, torch.float32, len(grads), device)
    check_elements("skip", skip, torch.bool, len(grads), device)
    if reference := reference_op("gradient_norm", device):
        return reference(grads, unscale, skip)
    return torch.ops.dalle_fast.gradient_norm([_in_a_row(grad) for grad in grads], unscale, skip)


@register_fake("gradient_norm")
def _gradient_norm_fake(grads: list[Tensor], unscale: Tensor | None, skip: Tensor | None) -> tuple[Tensor, Tensor]:
    return grads[0].new_empty(()), grads[0].new_empty((len(grads),), dtype=torch.bool)


def _in_a_row(x: Tensor) -> Tensor:
    """The elements of x as one contiguous dimension, in any order; a copy only if x has gaps or repeats."""
    if _is_channels_last(x):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(-1).contiguous()  # the first keeps the stride of a vector, and expanded elements


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
