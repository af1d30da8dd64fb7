"""Linear layers on a few rows, as in sampling: the time goes into reading the weights, so these are packed."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._check import check_tensor
from ._library import reference_op, refuse_gradients, register_fake

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
PANEL = 16  # outputs that are stored together
LINE = 4  # bytes of each in a cache line: consecutive inputs


class PackedWeight(NamedTuple):
    """The weight of a linear layer in the order in which ``packed_linear`` reads it.

    Args:
        panels: [ceil(out / 16), lines, inputs per line * 16] in the format, zero-padded.
        scales: [out], float32, for int8: weight = scale * stored; empty for the others.
        in_features, out_features: of the layer.
        format: ``float32``, ``bfloat16`` or ``int8``.
    """

    panels: Tensor
    scales: Tensor
    in_features: int
    out_features: int
    format: str


def pack_linear(weight: Tensor, format: str = "bfloat16") -> PackedWeight:
    """Pack a weight once, for many calls of ``packed_linear``.

    Args:
        weight: [out, in], float32.
        format: ``float32``; ``bfloat16``, rounded to nearest even; or ``int8``, each output with its own scale, which
            takes its largest weight to 127.

    Raises:
        TypeError: another dtype.
        ValueError: no matrix, an unknown format, or for int8 a weight that is not finite.
        RuntimeError: this install has no kernel for the device.
    """
    check_tensor("weight", weight, torch.float32, ("out", "in"))
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    weight = weight.detach().contiguous()
    if format == "int8" and not weight.isfinite().all():
        raise ValueError("weight: expected finite values for int8, got infinity or NaN")
    if reference := reference_op("pack_linear", weight.device):
        return PackedWeight(*reference(weight, format))
    panels, scales = torch.ops.dalle_fast.pack_linear(weight, FORMATS[format])
    return PackedWeight(panels, scales, weight.shape[1], weight.shape[0], format)


def packed_linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` on packed weights: x W^T + bias. Products are summed in float32; there are no gradients.

    Meant for up to about 64 rows. A row's result does not depend on the other rows.

    Args:
        x: [..., in], float32.
        packed: from ``pack_linear``.
        bias: [out], float32.

    Returns:
        [..., out], float32.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not fit, or different devices.
        RuntimeError: x or bias requires gradients; this install has no kernel for the device.
    """
    device = packed.panels.device
    check_tensor("x", x, torch.float32, device=device)
    if x.shape[-1:] != (packed.in_features,):
        raise ValueError(f"x: expected [..., {packed.in_features}], got {list(x.shape)}")
    if bias is not None:
        check_tensor("bias", bias, torch.float32, (packed.out_features,), device)
    refuse_gradients("packed_linear", x, bias)
    if reference := reference_op("packed_linear", device):
        return reference(x, packed, bias)
    return torch.ops.dalle_fast.packed_linear(x, packed.panels, packed.scales, bias, packed.out_features)


@register_fake("pack_linear")
def _pack_linear_fake(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    depth = LINE // dtype.itemsize
    shape = (-(-weight.shape[0] // PANEL), -(-weight.shape[1] // depth), depth * PANEL)
    return weight.new_empty(shape, dtype=dtype), weight.new_empty(weight.shape[0] if dtype == torch.int8 else 0)


@register_fake("packed_linear")
def _packed_linear_fake(x: Tensor, panels: Tensor, scales: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
