"""AdamW with 16-bit moments (section 2.4, appendix D), and the norm of all gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._library import kernels_loaded, reference_op


@torch.no_grad()
def adamw16(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    means: Sequence[torch.Tensor],
    variances: Sequence[torch.Tensor],
    step: int | torch.Tensor,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | torch.Tensor,
    unscale: torch.Tensor | None = None,
    clip: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> None:
    """One AdamW update of n parameters in place, moments kept in 16 bits (section 2.4, appendix D).

    On CUDA one launch updates all parameters (784 at a time) and nothing is read back on the host. What changes between
    updates can be tensors, so that a captured CUDA graph can be replayed.

    Args:
        params: n tensors of any shapes on one device, float32, contiguous or channels_last; updated.
        grads: float32 in the shapes of params. Must be finite where not skipped: a NaN would be stored as the largest
            moment.
        means: running means, int16 bit patterns of 1-6-9 in the shapes and strides of params; zeros at first; updated.
        variances: running means of the squares, likewise in 0-6-10, clipped to 5; updated.
        step: number of this update, from 1; or one int64 on the device.
        lr: step size; or one float32 on the device.
        beta1, beta2, eps: as in ``torch.optim.AdamW``.
        weight_decay: as in ``torch.optim.AdamW``; or [n] float32, one for each parameter.
        unscale: [n] float32, what each gradient is multiplied by: 1 over the scale of its resblock.
        clip: one float32, what every gradient is multiplied by, such as the limit over :func:`gradient_norm`.
        skip: [n] bool, True for parameters that stay as they are, moments included.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a tensor of another shape, memory layout or device, or a number out of range.
    """
    n = len(params)
    for name, tensors in (("grads", grads), ("means", means), ("variances", variances)):
        if len(tensors) != n:
            raise ValueError(f"{name}: expected {n} tensors, as many as params, got {len(tensors)}")
    if n == 0:
        return
    device = params[0].device
    for i in range(n):
        _check_parameter(f"[{i}]", params[i], grads[i], means[i], variances[i], device)
    if not isinstance(step, torch.Tensor) and step < 1:
        raise ValueError(f"step: expected at least 1, got {step}")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: expected a number in [0, 1), got {beta}")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not isinstance(value, torch.Tensor) and not value >= 0:
            raise ValueError(f"{name}: expected a number of at least 0, got {value}")
    step = _on_device("step", step, torch.int64, 1, device)
    lr = _on_device("lr", lr, torch.float32, 1, device)
    weight_decay = _on_device("weight_decay", weight_decay, torch.float32, n, device)
    check_option("unscale", unscale, torch.float32, n, device)
    check_option("clip", clip, torch.float32, 1, device)
    check_option("skip", skip, torch.bool, n, device)
    arguments = (step, lr, beta1, beta2, eps, weight_decay, unscale, clip, skip)
    if reference := reference_op("adamw16", device):
        return reference(params, grads, means, variances, *arguments)
    grads = [
        grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)
        for param, grad in zip(params, grads, strict=True)
    ]
    torch.ops.dalle_fast.adamw16(params, grads, means, variances, *arguments)


@torch.no_grad()
def gradient_norm(
    grads: Sequence[torch.Tensor], unscale: torch.Tensor | None = None, skip: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean norm of all gradients together, and which parameters to leave out of the update.

    A gradient that is not finite is left out, of the norm, too. Nothing is read back on the host.

    Args:
        grads: n tensors, at least one, of any shapes on one device, float32.
        unscale: [n] float32, what each gradient is multiplied by first.
        skip: [n] bool, True for gradients that are left out already.

    Returns:
        The norm, [] float32, and [n] bool: ``skip``, and True where a gradient is not finite. Both on the device of
        grads, as ``clip`` and ``skip`` of :func:`adamw16` want them::

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
        check_option(f"grads[{i}]", grad, torch.float32, grad.numel(), device)
    check_option("unscale", unscale, torch.float32, len(grads), device)
    check_option("skip", skip, torch.bool, len(grads), device)
    if reference := reference_op("gradient_norm", device):
        return reference(grads, unscale, skip)
    return torch.ops.dalle_fast.gradient_norm([_in_a_row(grad) for grad in grads], unscale, skip)


def _in_a_row(x: torch.Tensor) -> torch.Tensor:
    """The elements of x as one contiguous dimension, in any order; a copy only if x has gaps."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(-1)


def _check_parameter(
    index: str,
    param: torch.Tensor,
    grad: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    device: torch.device,
) -> None:
    if not (param.is_contiguous() or (param.dim() == 4 and param.is_contiguous(memory_format=torch.channels_last))):
        raise ValueError(f"params{index}: expected contiguous or channels_last memory, got strides {param.stride()}")
    for name, tensor, dtype in (
        ("params", param, torch.float32),
        ("grads", grad, torch.float32),
        ("means", mean, torch.int16),
        ("variances", variance, torch.int16),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name}{index}: expected {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}{index}: expected {device}, got {tensor.device}")
        if tensor.shape != param.shape:
            raise ValueError(f"{name}{index}: expected {list(param.shape)}, got {list(tensor.shape)}")
        if tensor is not grad and tensor.stride() != param.stride():
            raise ValueError(f"{name}{index}: expected the strides of params {param.stride()}, got {tensor.stride()}")


def check_option(name: str, x: torch.Tensor | None, dtype: torch.dtype, numel: int, device: torch.device) -> None:
    """Raise TypeError or ValueError unless x is None or such a tensor."""
    if x is None:
        return
    if x.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
    if x.numel() != numel:
        raise ValueError(f"{name}: expected {numel} elements, got {x.numel()}")
    if x.device != device:
        raise ValueError(f"{name}: expected {device}, got {x.device}")


def _on_device(
    name: str, x: float | torch.Tensor, dtype: torch.dtype, numel: int, device: torch.device
) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        return torch.full((numel,), x, dtype=dtype, device=device)
    check_option(name, x, dtype, numel, device)
    return x


if kernels_loaded():

    @torch.library.register_fake("dalle_fast::adamw16")
    def _adamw16_fake(
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        means: list[torch.Tensor],
        variances: list[torch.Tensor],
        step: torch.Tensor,
        lr: torch.Tensor,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: torch.Tensor,
        unscale: torch.Tensor | None,
        clip: torch.Tensor | None,
        skip: torch.Tensor | None,
    ) -> None:
        return None

    @torch.library.register_fake("dalle_fast::gradient_norm")
    def _gradient_norm_fake(
        grads: list[torch.Tensor], unscale: torch.Tensor | None, skip: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return grads[0].new_empty(()), grads[0].new_empty((len(grads),), dtype=torch.bool)
