"""Residual sum with LayerNorm around 16-bit resblocks, and per-resblock gradient scaling (section 2.4).

Each resblock has its own gradient scale: the factor on the gradients inside it, so that they fit 16 bits. The state of
n resblocks is three tensors [n] on the device of the model, which nothing in a step reads back:

    scale            float32, from ``replicas * 2**7`` to ``replicas * 2**24``; starts at ``replicas * 2**13``
    since_division   int32, steps since the scale was last divided
    nonfinite        int32, not 0 if a gradient of the resblock was Inf or NaN in this step

A step: the backward of ``residual_layer_norm`` reads ``scale`` and sets ``nonfinite``; whoever finds Inf or NaN in the
gradients of a resblock's parameters sets it too; replicas take the maximum of their ``nonfinite``; the optimizer skips
what it marks; ``update_scales`` adjusts ``scale`` and clears ``nonfinite``. Gradients of parameters inside a resblock
come out multiplied by ``scale``, those of the LayerNorm in front of it do not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._check import HALVES, check_elements, check_tensor
from ._library import reference_op, refuse_derivatives, refuse_forward_mode, register_autograd, register_fake

FIRST_SCALE = 2.0**13  # of one replica (appendix D)
WINDOW = 125  # steps between two divisions of a scale


def residual_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    scale_in: Tensor | None = None,
    scale_out: Tensor | None = None,
    nonfinite: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a resblock's output to the residual stream and normalise the sum for the next one (section 2.4).

    With scales the backward is that of figure 4: the gradient of ``normed`` comes out of the next resblock multiplied
    by ``scale_in``; its Inf and NaN become 0, it is divided by ``scale_in``, goes through the LayerNorm and is added to
    the gradient of the stream. That sum multiplied by ``scale_out`` is the gradient of ``branch``. Those of ``x``,
    ``weight`` and ``bias`` have no scale. Differentiable once, not in forward mode. A transformer of n resblocks:

        total, normed = residual_layer_norm(x, None, ..., scale_in=scale[0], nonfinite=nonfinite[0])
        for i in range(1, n):
            branch = resblock[i - 1](normed)
            total, normed = residual_layer_norm(
                total, branch, ..., scale_in=scale[i], scale_out=scale[i - 1], nonfinite=nonfinite[i]
            )
        total, normed = residual_layer_norm(total, resblock[n - 1](normed), ..., scale_out=scale[n - 1])

    Args:
        x: [..., D], the stream, float32 (or float64).
        branch: [..., D], the resblock's output: the dtype of x, bfloat16 or float16. None in front of the first one.
        weight, bias: [D], the dtype of x.
        eps: added to the variance; positive.
        dtype: of the normalised output: that of x (the default), bfloat16 or float16.
        scale_in: float32, one element: gradient scale of the resblock that reads ``normed``. None: 1, nothing filtered.
        scale_out: float32, one element: gradient scale of the resblock that made ``branch``. None: 1.
        nonfinite: int32, one element, given with ``scale_in``: the backward sets it to 1 where it filters anything.

    Returns:
        total: x + branch, the dtype of x.
        normed: LayerNorm of total over D, in ``dtype``; the statistics are in the dtype of x.

    Raises:
        TypeError: an argument of another dtype.
        ValueError: shapes or devices that do not match, an empty x, an eps that is not positive and finite, one of
            ``scale_in`` and ``nonfinite`` alone, or ``scale_out`` without a branch.
        RuntimeError: a derivative that the kernels do not have; this install has no kernel for the device.
    """
    check_tensor("x", x, (torch.float32, torch.float64))
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"x: expected a non-empty [..., D], got {list(x.shape)}")
    dtype = dtype or x.dtype
    if dtype not in (x.dtype, *HALVES):
        raise TypeError(f"dtype: expected {x.dtype}, bfloat16 or float16, got {dtype}")
    if branch is not None:
        check_tensor("branch", branch, (x.dtype, *HALVES), x.shape, x.device)
    check_tensor("weight", weight, x.dtype, x.shape[-1:], x.device)
    check_tensor("bias", bias, x.dtype, x.shape[-1:], x.device)
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps: expected a finite positive number, got {eps}")
    if (scale_in is None) != (nonfinite is None):
        raise ValueError("scale_in, nonfinite: expected both or neither")
    if scale_out is not None and branch is None:
        raise ValueError("scale_out: expected None without a branch")
    check_elements("scale_in", scale_in, torch.float32, 1, x.device)
    check_elements("scale_out", scale_out, torch.float32, 1, x.device)
    check_elements("nonfinite", nonfinite, torch.int32, 1, x.device)
    if reference := reference_op("residual_layer_norm", x.device):
        return reference(x, branch, weight, bias, eps, dtype, scale_in, scale_out, nonfinite)
    refuse_forward_mode("residual_layer_norm: differentiable once", x, branch, weight, bias)
    branch = None if branch is None else branch.contiguous()
    total, normed, _, _ = torch.ops.dalle_fast.residual_layer_norm(
        x.contiguous(), branch, weight.contiguous(), bias.contiguous(), eps, dtype, scale_in, scale_out, nonfinite
    )
    return x if branch is None else total, normed


@register_fake("residual_layer_norm")
def _residual_layer_norm_fake(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    scale_in: Tensor | None,
    scale_out: Tensor | None,
    nonfinite: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty((0,) if branch is None else x.shape)  # without a branch x serves
    rows = (*x.shape[:-1], 1)
    return total, x.new_empty(x.shape, dtype=dtype), x.new_empty(rows), x.new_empty(rows)


@register_fake("residual_layer_norm_backward")
def _residual_layer_norm_backward_fake(
    grad_total: Tensor | None,
    grad_normed: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch_dtype: torch.dtype,
    scale_in: Tensor | None,
    scale_out: Tensor | None,
    nonfinite: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shared = branch_dtype == total.dtype and scale_out is None  # the gradient of x serves both
    grads = total.new_empty(total.shape), total.new_empty((0,) if shared else total.shape, dtype=branch_dtype)
    return *grads, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, branch, weight, _, _, _, scale_in, scale_out, nonfinite = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x if branch is None else total, weight, mean, rstd, scale_in, scale_out)
    ctx.branch_dtype = None if branch is None else branch.dtype
    ctx.nonfinite = nonfinite  # not among the saved: the backward of other resblocks writes to its neighbours


def _backward(ctx: Any, grad_total: Tensor, grad_normed: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    total, weight, mean, rstd, scale_in, scale_out = ctx.saved_tensors
    has_branch = ctx.branch_dtype is not None
    grad_x, grad_branch, grad_weight, grad_bias = torch.ops.dalle_fast.residual_layer_norm_backward(
        grad_total.contiguous() if has_branch else None,
        grad_normed.contiguous(),
        *(total, weight, mean, rstd),
        ctx.branch_dtype if has_branch else total.dtype,
        *(scale_in, scale_out, ctx.nonfinite),
    )
    if grad_branch.numel() == 0:
        grad_branch = grad_x
    return grad_x, grad_branch if has_branch else None, grad_weight, grad_bias, *[None] * 5


register_autograd("residual_layer_norm", _backward, setup_context=_setup_context)


for _op in ("scale_gradient", "unscale_gradient"):
    refuse_derivatives(_op, f"{_op}: not differentiable")


def scale_gradient(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient that enters a resblock on the way back: multiplied by the block's scale, cast (figure 4).

    A public op, for your own model: :func:`residual_layer_norm` does the same within its backward. Not differentiable.

    Args:
        grad: any shape, float32.
        scale: float32, one element.
        dtype: of the result: float32, bfloat16 or float16; values out of its range become infinite.

    Raises:
        TypeError: another dtype.
        ValueError: a scale of more than one element, or on another device.
    """
    check_tensor("grad", grad, torch.float32)
    check_elements("scale", scale, torch.float32, 1, grad.device)
    if dtype not in (torch.float32, *HALVES):
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    if reference := reference_op("scale_gradient", grad.device):
        return reference(grad, scale, dtype)
    return torch.ops.dalle_fast.scale_gradient(grad.contiguous(), scale, dtype)


@register_fake("scale_gradient")
def _scale_gradient_fake(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


def unscale_gradient(grad: Tensor, scale: Tensor) -> Tensor:
    """The gradient that leaves a resblock: Inf and NaN become 0, then divided by the scale, in float32 (figure 4).

    A public op, for your own model: :func:`residual_layer_norm` does the same within its backward. Not differentiable.

    Args:
        grad: any shape, float32, bfloat16 or float16.
        scale: float32, one element.

    Raises:
        TypeError: another dtype.
        ValueError: a scale of more than one element, or on another device.
    """
    check_tensor("grad", grad, (torch.float32, *HALVES))
    check_elements("scale", scale, torch.float32, 1, grad.device)
    if reference := reference_op("unscale_gradient", grad.device):
        return reference(grad, scale)
    return torch.ops.dalle_fast.unscale_gradient(grad.contiguous(), scale)


@register_fake("unscale_gradient")
def _unscale_gradient_fake(grad: Tensor, scale: Tensor) -> Tensor:
    return grad.new_empty(grad.shape, dtype=torch.float32)


def initial_scales(
    n: int, replicas: int = 1, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``scale``, ``since_division``, ``nonfinite`` [n] of n resblocks before the first step.

    Raises:
        ValueError: n or replicas, the number of data-parallel replicas, is less than 1.
    """
    for name, value in (("n", n), ("replicas", replicas)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    scale = torch.full((n,), replicas * FIRST_SCALE, dtype=torch.float32, device=device)
    since_division = torch.full((n,), WINDOW, dtype=torch.int32, device=device)
    return scale, since_division, torch.zeros(n, dtype=torch.int32, device=device)


@torch.no_grad()
def update_scales(scale: Tensor, since_division: Tensor, nonfinite: Tensor, replicas: int = 1) -> None:
    """After a step: adjust the gradient scale of every resblock and clear ``nonfinite`` (appendix D).

    The scale of a resblock whose gradients were finite is multiplied by 2^(1/1000); that of another is divided by
    sqrt(2), but not twice within 125 steps, skipped ones included. Results stay within
    ``replicas * 2**7`` and ``replicas * 2**24``.

    Args:
        scale: [n], float32; updated.
        since_division: [n], int32; updated. Counts up to 125.
        nonfinite: [n], int32, not 0 for resblocks whose gradients were not all finite; set to 0.
        replicas: number of data-parallel replicas, M in the paper.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: a tensor of another shape, not contiguous or on another device, or replicas less than 1.
    """
    check_tensor("scale", scale, torch.float32, ("n",))
    check_tensor("since_division", since_division, torch.int32, scale.shape, scale.device)
    check_tensor("nonfinite", nonfinite, torch.int32, scale.shape, scale.device)
    for name, state in (("scale", scale), ("since_division", since_division), ("nonfinite", nonfinite)):
        if not state.is_contiguous():
            raise ValueError(f"{name}: expected contiguous memory, got strides {state.stride()}")
    if replicas < 1:
        raise ValueError(f"replicas: expected at least 1, got {replicas}")
    if reference := reference_op("update_scales", scale.device):
        return reference(scale, since_division, nonfinite, replicas)
    torch.ops.dalle_fast.update_scales(scale, since_division, nonfinite, replicas)


@register_fake("update_scales")
def _update_scales_fake(scale: Tensor, since_division: Tensor, nonfinite: Tensor, replicas: int) -> None:
    return None
