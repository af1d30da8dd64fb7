"""The residual sum with LayerNorm and the gradient scaling of resblocks, against their definitions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers.op_checks import (
    HALVES,
    assert_equal,
    normal,
    same_on_any_number_of_threads,
    surrounded,
    surrounded_in_memory,
)
from helpers.tolerances import FORWARD, HALF
from helpers.tolerances import error as error_of
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_fast as df
from dalle_fast import reference

DTYPES = [torch.float32, *HALVES]
error = partial(error_of, least=1e-6)


def inputs(*shape, dtype=torch.float32, branch_dtype=None, seed=0, device="cpu"):
    """x, branch, weight, bias; a mean well away from 0 makes a careless variance show."""
    sizes = [shape, shape, shape[-1:], shape[-1:]]
    x, branch, weight, bias = (normal(*size, seed=seed + i, dtype=dtype, device=device) for i, size in enumerate(sizes))
    return 3 + x, branch.to(branch_dtype or dtype), 1 + weight, bias


def run(module, x, branch, weight, bias, dtype=None, upstream=None, **scaling):
    """Outputs and gradients, for fixed upstream gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, branch, weight, bias)]
    total, normed = module.residual_layer_norm(*leaves, dtype=dtype, **scaling)
    if upstream is None:
        upstream = [normal(*x.shape, seed=5 + i, device=x.device).to(out) for i, out in enumerate((total, normed))]
    return [total, normed, *torch.autograd.grad([total, normed], leaves, upstream)]


def new_flag(device="cpu"):
    return torch.zeros((), dtype=torch.int32, device=device)


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 7), max_size=2), width=st.integers(4, 300), seed=st.integers(0, 1000))
def test_matches_float64(shape, width, seed, device):
    tensors = inputs(*shape, width, seed=seed, device=device)
    exact = run(reference, *(tensor.double() for tensor in tensors))
    theirs = run(reference, *tensors)
    for result, eager, wanted in zip(run(df, *tensors), theirs, exact, strict=True):
        assert result.shape == wanted.shape
        # A row of nearly equal values has a large 1 / sigma: there, no worse than torch's own float32.
        assert error(result, wanted) <= max(FORWARD, HALF * error(eager, wanted))


@pytest.mark.parametrize("branch_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision(branch_dtype, dtype, device):
    """The sum is computed in float32, and a half result rounded from it: at most twice torch's own error."""
    tensors = inputs(40, 96, branch_dtype=branch_dtype, device=device)
    exact = run(reference, *(tensor.double() for tensor in tensors))
    eager = run(reference, *tensors, dtype=dtype)
    results = run(df, *tensors, dtype=dtype)
    assert [result.dtype for result in results] == [result.dtype for result in eager]
    assert torch.equal(results[0], eager[0])
    if dtype != torch.float32:
        exact[2:] = run(reference, *(tensor.double() for tensor in tensors), dtype=dtype)[2:]
    for result, theirs, wanted in zip(results, eager, exact, strict=True):
        assert error(result, wanted) <= max(FORWARD, HALF * error(theirs, wanted))


def test_gradcheck(device):
    tensors = [tensor.requires_grad_() for tensor in inputs(3, 2, 5, dtype=torch.float64, device=device)]
    assert torch.autograd.gradcheck(df.residual_layer_norm, tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, device):
    x, branch, weight, bias = inputs(3, 2, 20, branch_dtype=dtype, device=device)
    leaves = [tensor.requires_grad_() for tensor in (x, branch, weight, bias)]
    op = torch.ops.dalle_fast.residual_layer_norm.default
    scale = torch.tensor(8.0, device=device)
    for scaling in ((None, None, None), (scale, scale, new_flag(device))):
        torch.library.opcheck(op, (*leaves, 1e-5, dtype, *scaling))
    torch.library.opcheck(op, (x, None, weight, bias, 1e-5, dtype, scale, None, new_flag(device)))
    with torch.no_grad():
        total, normed, mean, rstd = op(*leaves, 1e-5, dtype, None, None, None)
        backward = torch.ops.dalle_fast.residual_layer_norm_backward.default
        for grad_total, *scaling in ((total, None, None, None), (None, scale, scale, new_flag(device))):
            torch.library.opcheck(backward, (grad_total, normed, total, weight.detach(), mean, rstd, dtype, *scaling))
        torch.library.opcheck(torch.ops.dalle_fast.scale_gradient.default, (total, scale, dtype))
        torch.library.opcheck(torch.ops.dalle_fast.unscale_gradient.default, (normed, scale))
    torch.library.opcheck(torch.ops.dalle_fast.update_scales.default, (*df.initial_scales(5, device=device), 1))


def test_strided_and_surrounded_by_nan(device):
    x, branch, weight, bias = inputs(6, 33, device=device)
    expected = run(df, x, branch, weight, bias)
    x, branch = (surrounded(plain, pad=1, step=2, order=(1, 0)) for plain in (x, branch))
    weight, bias = (surrounded(plain, pad=1, step=2) for plain in (weight, bias))
    assert_equal(run(df, x, branch, weight, bias), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 2052, 8192, 8196])
def test_widths(width, dtype, device):
    """Powers of two and not, whole vectors and not, and wider than any block of threads holds."""
    tensors = inputs(3, width, dtype=dtype, device=device)
    exact = run(reference, *(tensor.double() for tensor in tensors))
    eager = run(reference, *tensors)
    for result, theirs, wanted in zip(run(df, *tensors), eager, exact, strict=True):
        assert error(result, wanted) <= max(FORWARD, HALF * error(theirs, wanted))


def test_odd_addresses(device):
    """Contiguous, but no row starts at a multiple of the size of a vector."""
    tensors = inputs(5, 64, device=device)
    moved = [surrounded_in_memory(tensor) for tensor in tensors]
    for result, wanted in zip(run(df, *moved), run(df, *tensors), strict=True):
        assert error(result, wanted.double()) <= 1e-6


def test_nan_stays_in_its_row(device):
    x, branch, weight, bias = inputs(5, 40, device=device)
    branch[2, 3] = float("nan")
    total, normed = df.residual_layer_norm(x, branch, weight, bias)
    assert total.isnan().sum() == 1
    assert normed[2].isnan().all()
    assert normed[[0, 1, 3, 4]].isfinite().all()


def test_same_bits_on_any_number_of_threads(device):
    tensors = inputs(400, 200, device=device)
    scale_in, scale_out = torch.tensor([3.0, 5.0], device=device)
    scaling = {"scale_in": scale_in, "scale_out": scale_out, "nonfinite": new_flag(device)}
    same_on_any_number_of_threads(lambda: [*run(df, *tensors), *run(df, *tensors, **scaling)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_scaling(dtype, device):
    grad = normal(37, 251, device=device)
    scale = torch.tensor(2.0**13 * 1.0007, device=device)
    scaled = df.scale_gradient(grad, scale, dtype)
    assert scaled.dtype == dtype
    assert torch.equal(scaled, reference.scale_gradient(grad, scale, dtype))
    scaled[3, 5], scaled[4, 6], scaled[36, 250] = float("nan"), float("inf"), float("-inf")
    back = df.unscale_gradient(scaled.t(), scale)
    assert torch.equal(back, reference.unscale_gradient(scaled.t(), scale))
    assert back.dtype == torch.float32
    assert back[5, 3] == back[6, 4] == back[250, 36] == 0
    assert df.scale_gradient(grad[:0], scale, dtype).shape == (0, 251)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_16_bit_number(dtype, device):
    """Each is read exactly; a number between two of them is rounded to the nearest, halfway to the even one."""
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    zeros = torch.zeros(65536, device=device)
    total, _ = df.residual_layer_norm(zeros, numbers, zeros, zeros)
    torch.testing.assert_close(total, numbers.float(), rtol=0, atol=0, equal_nan=True)
    finite = numbers[numbers.isfinite()].double().sort().values
    between = [finite, finite[:-1] + finite.diff() / 2, finite[:-1] + finite.diff() / 3, finite * 1.0001]
    values = torch.cat(between).float()
    stored = df.scale_gradient(values, torch.ones((), device=device), dtype)
    assert torch.equal(stored.view(torch.int16), values.to(dtype).view(torch.int16))


def test_float16_overflow_is_filtered(device):
    scale = torch.tensor(2.0**13, device=device)
    scaled = df.scale_gradient(torch.tensor([1.0, 100.0], device=device), scale, torch.float16)
    assert scaled.isinf().tolist() == [False, True]
    assert df.unscale_gradient(scaled, scale).tolist() == [1.0, 0.0]


def test_unscaled_without_branch(device):
    """In front of the first resblock: the stream is the sum."""
    x, _, weight, bias = (tensor.requires_grad_() for tensor in inputs(6, 5, 36, device=device))
    total, normed = df.residual_layer_norm(x, None, weight, bias)
    assert torch.equal(total, x)
    upstream = [normal(*x.shape, seed=i, device=device) for i in (1, 2)]
    results = [normed, *torch.autograd.grad([total, normed], [x, weight, bias], upstream)]
    leaves = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    exact = reference.residual_layer_norm(leaves[0], None, *leaves[1:])
    wanted = [exact[1], *torch.autograd.grad(exact, leaves, [grad.double() for grad in upstream])]
    for result, value in zip(results, wanted, strict=True):
        assert error(result, value) <= FORWARD


@pytest.mark.parametrize("branch_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 96])
def test_scaled_backward(width, dtype, branch_dtype, device):
    """Filter, unscale, LayerNorm, sum, scale and cast at once, against the float64 composition of the steps."""
    tensors = inputs(40, width, branch_dtype=branch_dtype, device=device)
    upstream = [normal(*tensors[0].shape, seed=i, device=device) for i in (7, 8)]
    upstream[1] = (upstream[1] * 700).to(dtype)
    for place, value in zip(((3, 5), (3, 6), (39, 32)), (torch.nan, torch.inf, -torch.inf), strict=True):
        upstream[1][place] = value
    scale_in, scale_out = torch.tensor([[700.0], [2.0**9 * 1.0007]], device=device)
    scales = {"scale_in": scale_in, "scale_out": scale_out}
    flags = [new_flag(device) for _ in range(3)]
    results = run(df, *tensors, dtype, upstream, nonfinite=flags[0], **scales)
    eager = run(reference, *tensors, dtype, upstream, nonfinite=flags[1], **scales)
    exact = run(
        reference,
        *(tensor.double() for tensor in tensors),
        upstream=[grad.double() for grad in upstream],
        nonfinite=flags[2],
        **scales,
    )
    assert flags == [1, 1, 1]
    assert [result.dtype for result in results] == [result.dtype for result in eager]
    for result, theirs, wanted in zip(results, eager, exact, strict=True):
        assert error(result, wanted) <= max(FORWARD, HALF * error(theirs, wanted))
    # The filter alone sets the flag, and never clears it.
    finite = [grad.nan_to_num(0, 0, 0) for grad in upstream]
    for flag, wanted in ((new_flag(device), 0), (new_flag(device) + 1, 1)):
        run(df, *tensors, dtype, finite, nonfinite=flag, **scales)
        assert flag == wanted


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 4).half()}, TypeError, "x: expected torch.float32 or torch.float64, got torch.float16"),
        ({"x": torch.zeros(0, 4)}, ValueError, r"x: expected a non-empty \[..., D\], got \[0, 4\]"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected a non-empty"),
        ({"branch": torch.zeros(4)}, ValueError, r"branch: expected \[2, 4\], got \[4\]"),
        ({"branch": torch.zeros(2, 4).double()}, TypeError, "branch: expected torch.float32 .* got torch.float64"),
        ({"dtype": torch.int32}, TypeError, "dtype: expected torch.float32, .* got torch.int32"),
        ({"weight": torch.zeros(1)}, ValueError, r"weight: expected \[4\], got \[1\]"),
        ({"bias": torch.zeros(4).half()}, TypeError, "bias: expected torch.float32, got torch.float16"),
        ({"branch": torch.zeros(2, 4, device="meta")}, ValueError, "branch: expected a tensor on cpu, got one on meta"),
        ({"weight": torch.zeros(4, device="meta")}, ValueError, "weight: expected a tensor on cpu, got one on meta"),
    ],
)
def test_bad_input(change, error, message):
    x = torch.zeros(2, 4)
    arguments = {"x": x, "branch": x, "weight": torch.ones(4), "bias": torch.zeros(4), **change}
    with pytest.raises(error, match=message):
        df.residual_layer_norm(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"nonfinite": None}, ValueError, "scale_in, nonfinite: expected both or neither"),
        ({"scale_in": None}, ValueError, "scale_in, nonfinite: expected both or neither"),
        ({"branch": None}, ValueError, "scale_out: expected None without a branch"),
        ({"scale_in": torch.ones(2)}, ValueError, r"scale_in: expected 1 element\(s\), got \[2\]"),
        (
            {"scale_out": torch.tensor(1.0).half()},
            TypeError,
            "scale_out: expected torch.float32, got torch.float16",
        ),
        (
            {"scale_out": torch.ones(1, device="meta")},
            ValueError,
            "scale_out: expected a tensor on cpu, got one on meta",
        ),
        ({"nonfinite": torch.tensor(0.0)}, TypeError, "nonfinite: expected torch.int32, got torch.float32"),
    ],
)
def test_bad_scaling(change, error, message):
    x, scale = torch.zeros(2, 4), torch.tensor(1.0)
    scaling = {"scale_in": scale, "scale_out": scale, "nonfinite": new_flag(), "branch": x, **change}
    with pytest.raises(error, match=message):
        df.residual_layer_norm(x, weight=torch.ones(4), bias=torch.zeros(4), **scaling)


def test_backward_of_nothing():
    empty, rows, width = torch.zeros(0, 4), torch.zeros(0, 1), torch.ones(4)
    with pytest.raises(RuntimeError, match=r"total: expected a non-empty \[..., D\]"):
        torch.ops.dalle_fast.residual_layer_norm_backward(
            None, empty, empty, width, rows, rows, torch.float32, None, None, None
        )


def test_bad_scale():
    grad = torch.zeros(3)
    with pytest.raises(TypeError, match=r"scale: expected torch.float32, got torch.float64"):
        df.scale_gradient(grad, torch.tensor(1.0).double(), torch.float16)
    with pytest.raises(ValueError, match=r"scale: expected 1 element\(s\), got \[3\]"):
        df.unscale_gradient(grad, torch.ones(3))
    with pytest.raises(TypeError, match=r"grad: expected torch.float32, got torch.float16"):
        df.scale_gradient(grad.half(), torch.tensor(1.0), torch.float16)
    with pytest.raises(TypeError, match=r"dtype: expected float32, bfloat16 or float16, got torch.int8"):
        df.scale_gradient(grad, torch.tensor(1.0), torch.int8)


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), float("inf"), -float("inf")])
def test_eps_is_positive_and_finite(eps):
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="eps: expected a finite positive number"):
        df.residual_layer_norm(x, None, x[0], x[0], eps)
