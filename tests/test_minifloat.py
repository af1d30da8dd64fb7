"""The 16-bit formats of appendix D: every code, every kind of number, and the kernels' own codec."""

from __future__ import annotations

import pytest
import torch

import dalle_fast as df
from dalle_fast.minifloat import FORMATS, decode, encode

EVERY_CODE = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
LARGEST = {"1-6-9": 15.984375, "0-6-10": 15.9921875}
STEP = {"1-6-9": 2.0**-9, "0-6-10": 2.0**-10}  # from 1 to the next number
INF, NAN = float("inf"), float("nan")

every_format = pytest.mark.parametrize("format", FORMATS)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if the bits are the same: 0 and -0 differ."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))


def sizes(format: str) -> torch.Tensor:
    """The values without a sign, in the order of their codes."""
    return decode(EVERY_CODE[: 2**15] if format == "1-6-9" else EVERY_CODE, format)


def awkward_floats() -> torch.Tensor:
    """Values of 1-6-9, the points halfway between, their neighbours, denormals, numbers that saturate; both signs."""
    values = sizes("1-6-9")
    halfway = (values[1:].double() + values[:-1].double()).div(2).float()
    special = torch.tensor([0.0, 2.0**-60, 2.0**-61, 1e-40, 15.99, 16.0, 1e30, INF, NAN])
    below, above = (torch.nextafter(halfway, torch.full((), end)) for end in (-INF, INF))
    positive = torch.cat([values, below, halfway, above, special])
    return torch.cat([positive, -positive])


@every_format
def test_every_code_comes_back(format):
    assert same(encode(decode(EVERY_CODE, format), format), EVERY_CODE)
    assert torch.equal(decode(EVERY_CODE.view(torch.int16), format), decode(EVERY_CODE, format))


@every_format
def test_the_values_are_those_of_the_paper(format):
    values = sizes(format)
    assert values[0] == 0
    assert values[1] == 2.0**-60 * (1 + STEP[format])
    assert values[-1] == LARGEST[format]
    steps = round(1 / STEP[format])
    for exponent in range(-60, 4):
        start = (exponent + 60) * steps
        wanted = (1 + torch.arange(steps, dtype=torch.float64) / steps) * 2.0**exponent
        assert torch.equal(values[start + 1 : start + steps].double(), wanted[1:])
        assert values[start] == (wanted[0] if start else 0)
    if format == "1-6-9":
        assert torch.equal(decode(EVERY_CODE[2**15 :], format), -values)


@every_format
def test_the_nearest_value_wins_and_halfway_the_larger(format):
    generator = torch.Generator().manual_seed(0)
    powers = torch.randn(50_000, generator=generator).double() * 2.0 ** torch.randint(
        -64, 6, (50_000,), generator=generator
    )
    x = torch.cat([awkward_floats(), powers.float()])
    x = x[~x.isnan()]
    values = sizes(format).double()
    halfway = (values[1:] + values[:-1]) / 2
    halfway[0] = 2.0**-60 * (1 + STEP[format] / 2)  # 2^-60 itself has the code of zero
    nearest = values[torch.searchsorted(halfway, x.double().abs(), right=True)]
    wanted = torch.where(x < 0, -nearest if format == "1-6-9" else 0.0, nearest)
    assert torch.equal(decode(encode(x, format), format), wanted.float())


@every_format
def test_rounding_and_saturation(format):
    step, largest = STEP[format], LARGEST[format]
    for value, wanted in [
        (1 + 0.49 * step, 1.0),
        (1 + 0.5 * step, 1 + step),  # half away from zero
        (1 + 1.5 * step, 1 + 2 * step),
        (2 - 0.5 * step, 2.0),  # the carry reaches the exponent
        (largest + step * 4, largest),  # would round to 16, which has no code
        (16.0, largest),
        (INF, largest),
        (NAN, largest),
        (-NAN, largest),
        (2.0**-60, 0.0),
        (2.0**-70, 0.0),
        (1e-45, 0.0),  # a denormal of float32
    ]:
        assert decode(encode(torch.tensor(value), format), format) == wanted, value
    negative = decode(encode(torch.tensor([-1.0 - 0.5 * step, -1e9, -INF]), format), format)
    assert negative.tolist() == ([-1 - step, -largest, -largest] if format == "1-6-9" else [0.0] * 3)


def test_zero_and_its_sign():
    zeros = torch.tensor([0.0, -0.0, 1e-30, -1e-30])
    assert encode(zeros, "1-6-9").tolist() == [0, 0x8000, 0, 0x8000]
    assert encode(zeros, "0-6-10").tolist() == [0, 0, 0, 0]
    back = decode(encode(zeros, "1-6-9"), "1-6-9")
    assert back.tolist() == [0.0] * 4
    assert back.signbit().tolist() == [False, True, False, True]


@every_format
def test_shapes_and_dtypes(format):
    x = torch.tensor([[0.5, 1.0, 3.0]] * 2)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        codes = encode(x.to(dtype).T, format)
        assert (codes.dtype, codes.shape) == (torch.uint16, (3, 2))
        assert torch.equal(decode(codes, format), x.T)
    assert encode(torch.tensor(1.0), format).shape == ()
    assert decode(encode(torch.zeros(0, 3), format), format).shape == (0, 3)
    # A float64 is rounded once: rounded to float32 first, this one would be halfway, and go up.
    just_below = torch.tensor(1 + STEP[format] / 2 - 2.0**-40, dtype=torch.float64)
    assert decode(encode(just_below, format), format) == 1.0


def test_bad_input():
    with pytest.raises(ValueError, match="format: expected one of 1-6-9, 0-6-10, got 1-5-10"):
        encode(torch.zeros(2), "1-5-10")
    with pytest.raises(ValueError, match="format: expected one of 1-6-9, 0-6-10, got float16"):
        decode(torch.zeros(2, dtype=torch.uint16), "float16")
    with pytest.raises(TypeError, match=r"x: expected a float dtype, got torch.int64"):
        encode(torch.zeros(2, dtype=torch.int64), "1-6-9")
    with pytest.raises(TypeError, match=r"codes: expected torch.uint16 or torch.int16, got torch.int32"):
        decode(torch.zeros(2, dtype=torch.int32), "1-6-9")


# ---------------------------------------------------------------------------------------------- the kernels' codec


def updated_moments(grad, mean, variance, beta1, beta2):
    """The moments, uint16, after one step of the kernel."""
    mean, variance = mean.view(torch.int16).clone(), variance.view(torch.int16).clone()
    df.adamw16([torch.zeros_like(grad)], [grad], [mean], [variance], 1, 1e-3, beta1, beta2, 1e-8, 0.0)
    return mean.view(torch.uint16), variance.view(torch.uint16)


def test_kernels_encode_exactly(device):
    """With beta = 0 the new mean is the gradient, the new variance its square."""
    x = awkward_floats().to(device)
    zeros = torch.zeros(x.shape, dtype=torch.uint16, device=device)
    mean, variance = updated_moments(x, zeros, zeros, beta1=0.0, beta2=0.0)
    assert same(mean, encode(x + 0.0, "1-6-9"))  # the step turns -0 into 0
    squares = torch.fmin(x * x, torch.full_like(x, 5.0))  # NaN, too
    assert same(variance, encode(squares, "0-6-10"))


def test_kernels_decode_exactly(device):
    """A gradient equal to the mean leaves the mean alone."""
    codes = EVERY_CODE.to(device)
    grad = decode(codes, "1-6-9")
    mean, variance = updated_moments(grad, codes, codes, beta1=0.9, beta2=0.5)
    assert same(mean, encode(grad + 0.0, "1-6-9"))
    halved = (decode(codes, "0-6-10") * 0.5 + grad.square() * 0.5).clamp(max=5.0)
    assert same(variance, encode(halved, "0-6-10"))
