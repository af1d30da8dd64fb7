"""The 16-bit formats of appendix D, and AdamW on moments stored in them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_fast as df
from dalle_fast.reference import minifloat_decode, minifloat_encode

ADAMW = {"lr": 4.5e-4, "beta1": 0.9, "beta2": 0.96, "eps": 1e-8, "weight_decay": 4.5e-2}
EVERY_CODE = torch.arange(65536, dtype=torch.int32)
LARGEST = {"1-6-9": 15.984375, "0-6-10": 15.9921875}


def bits(code: torch.Tensor) -> torch.Tensor:
    """A moment's int16 bit pattern as a code in [0, 65536)."""
    return code.to(torch.int32) & 0xFFFF


def kernel_encode(x: torch.Tensor, format: str) -> torch.Tensor:
    """The kernel's encoder: with beta = 0 the new mean is the gradient, the new variance its square."""
    mean = torch.zeros(x.shape, dtype=torch.int16)
    variance = mean.clone()
    df.adamw16(torch.zeros_like(x), x, mean, variance, 1, 0.0, 0.0, 0.0, 1e-8, 0.0)
    return bits(mean if format == "1-6-9" else variance)


def awkward_floats() -> torch.Tensor:
    """Every value of 1-6-9, the points halfway between, their neighbours, denormals, and what saturates."""
    codes = EVERY_CODE[: 2**15]
    values = minifloat_decode(codes, "1-6-9")
    halfway = (values[1:].double() + values[:-1].double()).div(2).float()
    special = torch.tensor([0.0, -0.0, 2.0**-60, 2.0**-61, 1e-40, 15.99, 16.0, 1e30, float("inf"), float("nan")])
    up, down = (torch.full((), end) for end in (float("inf"), float("-inf")))
    positive = torch.cat([values, halfway, torch.nextafter(halfway, up), torch.nextafter(halfway, -up), special])
    assert (torch.nextafter(halfway, down) < halfway).all()
    return torch.cat([positive, -positive])


@pytest.mark.parametrize("format", ["1-6-9", "0-6-10"])
def test_every_code_comes_back(format):
    codes = EVERY_CODE
    values = minifloat_decode(codes, format)
    back = minifloat_encode(values, format)
    if format == "1-6-9":
        assert back[0x8000] == 0  # -0 is stored as 0
        codes = torch.where(codes == 0x8000, 0, codes)
    assert torch.equal(back, codes)
    sizes = values[: 2**15] if format == "1-6-9" else values
    assert (sizes.diff() > 0).all()
    assert sizes[1] == 2.0**-60 * (1 + 2.0 ** -(9 if format == "1-6-9" else 10))
    assert sizes[-1] == LARGEST[format]


@pytest.mark.parametrize("format", ["1-6-9", "0-6-10"])
def test_rounding_and_saturation(format):
    step = 2.0**-9 if format == "1-6-9" else 2.0**-10
    largest = LARGEST[format]
    for value, wanted in [
        (1 + 0.49 * step, 1.0),
        (1 + 0.5 * step, 1 + step),  # half away from zero
        (1 + 1.5 * step, 1 + 2 * step),
        (2 - 0.5 * step, 2.0),  # the carry reaches the exponent
        (16.0, largest),
        (float("inf"), largest),
        (float("nan"), largest),
        (0.0, 0.0),
        (2.0**-60, 0.0),  # field 0 with significand 0 is the code of zero
        (2.0**-70, 0.0),
    ]:
        assert minifloat_decode(minifloat_encode(torch.tensor(value), format), format) == wanted, value
    negative = minifloat_decode(minifloat_encode(torch.tensor([-1.0 - 0.5 * step, -1e9]), format), format)
    assert negative.tolist() == ([-1 - step, -largest] if format == "1-6-9" else [0.0, 0.0])


def test_kernel_codec_is_exact():
    """Encoder and decoder of the kernel, on every code and every awkward float."""
    x = awkward_floats()
    assert torch.equal(kernel_encode(x, "1-6-9"), minifloat_encode(x, "1-6-9"))
    squares = torch.fmin(x * x, torch.tensor(5.0))  # NaN, too
    assert torch.equal(kernel_encode(x, "0-6-10"), minifloat_encode(squares, "0-6-10"))

    mean, variance = EVERY_CODE.to(torch.int16), EVERY_CODE.to(torch.int16)
    grad = minifloat_decode(EVERY_CODE, "1-6-9")  # a gradient equal to the mean leaves the mean alone
    df.adamw16(torch.zeros(65536), grad, mean, variance, 1, 0.0, 0.9, 0.5, 1e-8, 0.0)
    assert torch.equal(bits(mean), torch.where(EVERY_CODE == 0x8000, 0, EVERY_CODE))
    halved = (minifloat_decode(EVERY_CODE, "0-6-10") * 0.5 + grad.square() * 0.5).clamp(max=5.0)
    assert torch.equal(bits(variance), minifloat_encode(halved, "0-6-10"))


def start(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    param = torch.randn(shape, generator=generator)
    return generator, param, torch.zeros(shape, dtype=torch.int16), torch.zeros(shape, dtype=torch.int16)


def assert_same_state(ours, theirs):
    """Parameters to float32 rounding; moments to one code, because the products may be fused or not."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    for mine, wanted in zip(ours[1:], theirs[1:], strict=True):
        distance = (bits(mine) - bits(wanted)).abs()
        assert (distance <= 1).all()
        assert (distance > 0).sum() <= 0.01 * distance.numel()


def test_several_steps_match_the_reference():
    generator, *ours = start((50, 77))
    for step in range(1, 9):
        grad = torch.randn(50, 77, generator=generator) * 10.0 ** (step - 5)
        theirs = [tensor.clone() for tensor in ours]
        df.adamw16(ours[0], grad, *ours[1:], step, **ADAMW)
        df.reference.adamw16(theirs[0], grad, *theirs[1:], step, **ADAMW)
        assert_same_state(ours, theirs)


def test_follows_torch_adamw():
    """Within the formats' precision this is AdamW: a bowl is descended alike."""
    _, param, mean, variance = start(1000)
    param.clamp_(-2, 2)  # squares above 5 are clipped, which torch does not do
    twin = param.clone().requires_grad_()
    hyper = {"lr": 1e-2, "weight_decay": 0.01, "eps": 1e-8}
    torch_adamw = torch.optim.AdamW([twin], betas=(0.9, 0.96), **hyper)
    for step in range(1, 41):
        df.adamw16(param, param.clone(), mean, variance, step, beta1=0.9, beta2=0.96, **hyper)
        twin.grad = twin.detach().clone()
        torch_adamw.step()
    assert (param - twin).abs().max() < 2e-3  # of a way of 0.4


def test_variance_is_clipped():
    _, param, mean, variance = start(3)
    df.adamw16(param, torch.full((3,), 1e3), mean, variance, 1, **ADAMW)
    assert minifloat_decode(variance, "0-6-10").tolist() == [5.0] * 3
    assert minifloat_decode(mean, "1-6-9").tolist() == [LARGEST["1-6-9"]] * 3


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(0, 9), max_size=4), seed=st.integers(0, 100))
def test_odd_shapes(shape, seed):
    generator, *ours = start(shape, seed)
    theirs = [tensor.clone() for tensor in ours]
    grad = torch.randn(shape, generator=generator)
    df.adamw16(ours[0], grad, *ours[1:], 1, **ADAMW)
    df.reference.adamw16(theirs[0], grad, *theirs[1:], 1, **ADAMW)
    assert_same_state(ours, theirs)


def test_layouts_and_neighbours():
    """channels_last parameters, gradients of another layout, and nothing written beyond the tensor."""
    generator, *plain = start((6, 5, 3, 3))
    grad = torch.randn(6, 5, 3, 3, generator=generator)
    last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in plain]
    storage = torch.full((plain[0].numel() + 20,), float("nan"))
    inside = storage[10:-10].view(6, 5, 3, 3).copy_(plain[0])
    df.adamw16(inside, grad, plain[1].clone(), plain[2].clone(), 1, **ADAMW)
    assert storage.isnan().sum() == 20
    df.adamw16(last[0], grad, *last[1:], 1, **ADAMW)
    df.adamw16(plain[0], grad, *plain[1:], 1, **ADAMW)
    for a, b in zip(plain, last, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(inside, plain[0])


def test_bitwise_the_same_on_any_number_of_threads_and_anywhere():
    """Also at the end, where elements do not fill a register."""
    generator, *first = start(70_003)
    grad = torch.randn(70_003, generator=generator)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            state = [tensor.clone() for tensor in first]
            for step in (1, 2):
                df.adamw16(state[0], grad, *state[1:], step, **ADAMW)
            results.append(state)
    finally:
        torch.set_num_threads(threads)
    tail = [tensor[-3:].clone() for tensor in first]
    for step in (1, 2):
        df.adamw16(tail[0], grad[-3:], *tail[1:], step, **ADAMW)
    for i in range(3):
        assert torch.equal(results[0][i], results[1][i])
        assert torch.equal(results[1][i], results[2][i])
        assert torch.equal(results[0][i][-3:], tail[i])


def test_opcheck():
    generator, param, mean, variance = start((4, 5))
    grad = torch.randn(4, 5, generator=generator)
    torch.library.opcheck(torch.ops.dalle_fast.adamw16.default, (param, grad, mean, variance, 3, *ADAMW.values()))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"param": torch.zeros(4).half()}, TypeError, "param: expected torch.float32, got torch.float16"),
        ({"param": torch.zeros(8)[::2]}, ValueError, r"param: expected contiguous .* got strides \(2,\)"),
        ({"grad": torch.zeros(3)}, ValueError, r"grad: expected \[4\], got \[3\]"),
        ({"mean": torch.zeros(4)}, TypeError, "mean: expected torch.int16, got torch.float32"),
        ({"variance": torch.zeros(8).short()[::2]}, ValueError, "variance: expected the strides of param"),
        ({"step": 0}, ValueError, "step: expected at least 1, got 0"),
        ({"lr": float("nan")}, ValueError, "lr: expected a number of at least 0, got nan"),
        ({"beta1": 1.0}, ValueError, r"beta1: expected a number in \[0, 1\), got 1.0"),
        ({"eps": -1.0}, ValueError, "eps: expected a number of at least 0, got -1.0"),
    ],
)
def test_bad_input(change, error, message):
    moments = {name: torch.zeros(4, dtype=torch.int16) for name in ("mean", "variance")}
    arguments = {"param": torch.zeros(4), "grad": torch.zeros(4), **moments, "step": 1, **ADAMW, **change}
    with pytest.raises(error, match=message):
        df.adamw16(**arguments)
