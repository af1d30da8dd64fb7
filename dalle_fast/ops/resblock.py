"""Around the 16-bit resblocks: residual sum with LayerNorm, and per-resblock gradient scaling (section 2.4)."""

from __future__ import annotations

from typing import Any

import torch

from ._library import kernels_loaded, reference_op

HALF = (torch.bfloat16, torch.float16)


def residual_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a resblock's output to the residual stream and normalise the sum for the next one (section 2.4).

    Args:
        x: [..., D], the stream, float32 (or float64).
        branch: [..., D], the resblock's output: the dtype of x, bfloat16 or float16.
        weight, bias: [D], the dtype of x.
        eps: added to the variance.
        dtype: of the normalised output: that of x (the default), bfloat16 or float16.

    Returns:
        total: x + branch, the dtype of x.
        normed: LayerNorm of total over D, in ``dtype``; the statistics are in the dtype of x.

    Raises:
        TypeError: an argument of another dtype or device.
        ValueError: shapes that do not match, or nothing to normalise.
    """
    dtype = dtype or x.dtype
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: expected float32 or float64, got {x.dtype}")
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"x: expected a non-empty [..., D], got {list(x.shape)}")
    if branch.shape != x.shape:
        raise ValueError(f"branch: expected {list(x.shape)}, got {list(branch.shape)}")
    for name, value in (("branch", branch.dtype), ("dtype", dtype)):
        if value not in (x.dtype, *HALF):
            raise TypeError(f"{name}: expected {x.dtype}, bfloat16 or float16, got {value}")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector.shape != x.shape[-1:]:
            raise ValueError(f"{name}: expected {list(x.shape[-1:])}, got {list(vector.shape)}")
        if vector.dtype != x.dtype:
            raise TypeError(f"{name}: expected {x.dtype}, got {vector.dtype}")
    if reference := reference_op("residual_layer_norm", x.device):
        return reference(x, branch, weight, bias, eps, dtype)
    total, normed, _, _ = torch.ops.dalle_fast.residual_layer_norm(
        x.contiguous(), branch.contiguous(), weight.contiguous(), bias.contiguous(), eps, dtype
    )
    return total, normed


if kernels_loaded():

    @torch.library.register_fake("dalle_fast::residual_layer_norm")
    def _residual_layer_norm_fake(
        x: torch.Tensor,
        branch: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = (*x.shape[:-1], 1)
        return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), x.new_empty(rows), x.new_empty(rows)

    @torch.library.register_fake("dalle_fast::residual_layer_norm_backward")
    def _residual_layer_norm_backward_fake(
        grad_total: torch.Tensor,
        grad_normed: torch.Tensor,
        total: torch.Tensor,
        weight: torch.Tensor,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        branch_dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        branch_shape = (0,) if branch_dtype == total.dtype else total.shape  # the gradient of x serves both
        grads = total.new_empty(total.shape), total.new_empty(branch_shape, dtype=branch_dtype)
        return *grads, weight.new_empty(weight.shape), weight.new_empty(weight.shape)

    def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        _, branch, weight, _, _, _ = inputs
        total, _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.branch_dtype = branch.dtype

    def _backward(
        ctx: Any, grad_total: torch.Tensor, grad_normed: torch.Tensor, *_: Any
    ) -> tuple[torch.Tensor | None, ...]:
        grad_x, grad_branch, grad_weight, grad_bias = torch.ops.dalle_fast.residual_layer_norm_backward(
            grad_total.contiguous(), grad_normed.contiguous(), *ctx.saved_tensors, ctx.branch_dtype
        )
        if ctx.branch_dtype == grad_x.dtype:
            grad_branch = grad_x
        return grad_x, grad_branch, grad_weight, grad_bias, None, None

    torch.library.register_autograd("dalle_fast::residual_layer_norm", _backward, setup_context=_setup_context)


def scale_gradient(grad: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradient that enters a resblock on the way back: times the block's scale, cast (figure 4).

    Args:
        grad: any shape, float32. Not differentiated again.
        scale: float32, one element.
        dtype: of the result: float32, bfloat16 or float16; what leaves its range becomes infinite.

    Raises:
        TypeError: another dtype.
        ValueError: a scale of more than one element.
    """
    _check_scale(scale)
    if grad.dtype != torch.float32:
        raise TypeError(f"grad: expected float32, got {grad.dtype}")
    if dtype not in (torch.float32, *HALF):
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    if reference := reference_op("scale_gradient", grad.device):
        return reference(grad, scale, dtype)
    return torch.ops.dalle_fast.scale_gradient(grad.contiguous(), scale, dtype)


def unscale_gradient(grad: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The gradient that leaves a resblock: Inf and NaN become 0, then divided by the scale, in float32 (figure 4).

    Args:
        grad: any shape, float32, bfloat16 or float16. Not differentiated again.
        scale: float32, one element.

    Raises:
        TypeError: another dtype.
        ValueError: a scale of more than one element.
    """
    _check_scale(scale)
    if grad.dtype not in (torch.float32, *HALF):
        raise TypeError(f"grad: expected float32, bfloat16 or float16, got {grad.dtype}")
    if reference := reference_op("unscale_gradient", grad.device):
        return reference(grad, scale)
    return torch.ops.dalle_fast.unscale_gradient(grad.contiguous(), scale)


def _check_scale(scale: torch.Tensor) -> None:
    if scale.dtype != torch.float32:
        raise TypeError(f"scale: expected float32, got {scale.dtype}")
    if scale.numel() != 1:
        raise ValueError(f"scale: expected one element, got {list(scale.shape)}")


if kernels_loaded():

    @torch.library.register_fake("dalle_fast::scale_gradient")
    def _scale_gradient_fake(grad: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return grad.new_empty(grad.shape, dtype=dtype)

    @torch.library.register_fake("dalle_fast::unscale_gradient")
    def _unscale_gradient_fake(grad: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return grad.new_empty(grad.shape, dtype=torch.float32)
