"""The 16-bit number formats of Adam's moments (section 2.4, appendix D), named sign-exponent-significand.

"1-6-9" stores running means, "0-6-10" running variances. Both have 6 bits of exponent: float16 reaches down to 6e-8,
these to 1e-18. The kernels of :func:`dalle_fast.adamw16` have their own codec in ``csrc/common/minifloat.h``.
"""

from __future__ import annotations

import torch

FORMATS = {"1-6-9": (1, 9), "0-6-10": (0, 10)}  # bits of the sign and of the significand
EXPONENT_BITS, EXPONENT_BIAS = 6, 60


def encode(x: torch.Tensor, format: str) -> torch.Tensor:
    """The nearest 16-bit codes of numbers; halfway between two, the one farther from zero.

    There are no denormals: what rounds to 2^-60 or less becomes zero, because the code of 2^-60 is that of zero. There
    is no infinity: what is beyond the largest value, 15.984375 or 15.9921875, becomes that. So does NaN: an update with
    one is to be skipped before it gets here. Negative numbers become zero in 0-6-10, which has no sign.

    Args:
        x: any shape, float.
        format: ``1-6-9`` or ``0-6-10``.

    Returns:
        uint16 in the shape of x.

    Raises:
        TypeError: x is not float.
        ValueError: another format.
    """
    sign_bits, significand_bits = _bits(format)
    if not x.is_floating_point():
        raise TypeError(f"x: expected a float dtype, got {x.dtype}")
    # What is below works on the bits of a float: sign, exponent, significand. In float32 wherever that is exact.
    x = (x if x.dtype == torch.float64 else x.float()).contiguous()
    integer, bias, stored = (torch.int64, 1023, 52) if x.dtype == torch.float64 else (torch.int32, 127, 23)
    shift = stored - significand_bits
    pattern = x.view(integer)
    size = (pattern & torch.iinfo(integer).max).clamp_(max=(2 * bias + 1) << stored)  # NaN becomes infinity
    code = ((size + (1 << (shift - 1))) >> shift) - ((bias - EXPONENT_BIAS) << significand_bits)  # may carry
    code.clamp_(0, (1 << (EXPONENT_BITS + significand_bits)) - 1)
    negative = (pattern < 0) & ~x.isnan()
    code = torch.where(negative, code | 0x8000 if sign_bits else 0, code)
    return code.to(torch.uint16)


def decode(codes: torch.Tensor, format: str) -> torch.Tensor:
    """The numbers that codes stand for; code 0 is zero, and in 1-6-9 code 0x8000 is -0.

    Args:
        codes: any shape, uint16, or the same bits as int16, in which torch can do more.
        format: ``1-6-9`` or ``0-6-10``.

    Returns:
        float32 in the shape of codes.

    Raises:
        TypeError: codes of another dtype.
        ValueError: another format.
    """
    sign_bits, significand_bits = _bits(format)
    if codes.dtype not in (torch.uint16, torch.int16):
        raise TypeError(f"codes: expected torch.uint16 or torch.int16, got {codes.dtype}")
    code = codes.view(torch.int16).int()
    size = code & ((1 << (EXPONENT_BITS + significand_bits)) - 1)  # without the sign
    pattern = (size << (23 - significand_bits)) + ((127 - EXPONENT_BIAS) << 23)
    value = torch.where(size == 0, 0.0, pattern.view(torch.float32))
    return torch.where(code < 0, -value, value) if sign_bits else value


def _bits(format: str) -> tuple[int, int]:
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format}")
    return FORMATS[format]
