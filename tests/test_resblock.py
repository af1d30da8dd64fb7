"""The residual sum with LayerNorm and the gradient scaling of resblocks, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_fast as df
from dalle_fast import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(*shape, dtype=torch.float32, branch_dtype=None, seed=0):
    """x, branch, weight, bias; a mean well away from 0 makes a careless variance show."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    width = shape[-1]
    return 3 + normal(*shape), normal(*shape).to(branch_dtype or dtype), 1 + normal(width), normal(width)


def run(module, x, branch, weight, bias, dtype=None):
    """Outputs and gradients, for fixed upstream gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, branch, weight, bias)]
    total, normed = module.residual_layer_norm(*leaves, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(x.shape, generator=generator).to(out.dtype) for out in (total, normed)]
    return [total, normed, *torch.autograd.grad([total, normed], leaves, upstream)]


def error(result, exact):
    return (result.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-6)


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(1, 7), max_size=2), width=st.integers(4, 300), seed=st.integers(0, 1000))
def test_matches_float64(shape, width, seed):
    tensors = inputs(*shape, width, seed=seed)
    exact = run(reference, *(tensor.double() for tensor in tensors))
    theirs = run(reference, *tensors)
    for result, eager, wanted in zip(run(df, *tensors), theirs, exact, strict=True):
        assert result.shape == wanted.shape
        # A row of nearly equal values has a large 1 / sigma: no worse than torch's own float32 there.
        assert error(result, wanted) <= max(1e-5, 2 * error(eager, wanted))


@pytest.mark.parametrize("branch_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision(branch_dtype, dtype):
    """The sum is float32 arithmetic; a half result is the float32 one, rounded: at most twice torch's own error."""
    tensors = inputs(40, 96, branch_dtype=branch_dtype)
    exact = run(reference, *(tensor.double() for tensor in tensors))
    eager = run(reference, *tensors, dtype=dtype)
    results = run(df, *tensors, dtype=dtype)
    assert [result.dtype for result in results] == [result.dtype for result in eager]
    assert torch.equal(results[0], eager[0])
    if dtype != torch.float32:
        exact[2:] = run(reference, *(tensor.double() for tensor in tensors), dtype=dtype)[2:]
    for result, theirs, wanted in zip(results, eager, exact, strict=True):
        assert error(result, wanted) <= max(1e-5, 2 * error(theirs, wanted))


def test_gradcheck():
    tensors = [tensor.requires_grad_() for tensor in inputs(3, 2, 5, dtype=torch.float64)]
    assert torch.autograd.gradcheck(df.residual_layer_norm, tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    x, branch, weight, bias = inputs(3, 2, 20, branch_dtype=dtype)
    leaves = [tensor.requires_grad_() for tensor in (x, branch, weight, bias)]
    op = torch.ops.dalle_fast.residual_layer_norm.default
    torch.library.opcheck(op, (*leaves, 1e-5, dtype))
    with torch.no_grad():
        total, normed, mean, rstd = op(*leaves, 1e-5, dtype)
        backward = torch.ops.dalle_fast.residual_layer_norm_backward.default
        torch.library.opcheck(backward, (total, normed, total, weight.detach(), mean, rstd, dtype))
        scale = torch.tensor(8.0)
        torch.library.opcheck(torch.ops.dalle_fast.scale_gradient.default, (total, scale, dtype))
        torch.library.opcheck(torch.ops.dalle_fast.unscale_gradient.default, (normed, scale))


def test_strided_and_surrounded_by_nan():
    x, branch, weight, bias = inputs(6, 33)
    expected = run(df, x, branch, weight, bias)
    views = []
    for plain in (x, branch, weight[None], bias[None]):
        padded = torch.full((plain.shape[1] + 2, 2 * plain.shape[0] + 2), float("nan"))
        view = padded[1:-1, 1:-1:2].t()
        view.copy_(plain)
        views.append(view)
    for result, wanted in zip(run(df, *views[:2], views[2][0], views[3][0]), expected, strict=True):
        assert torch.equal(result, wanted)


def test_nan_stays_in_its_row():
    x, branch, weight, bias = inputs(5, 40)
    branch[2, 3] = float("nan")
    total, normed = df.residual_layer_norm(x, branch, weight, bias)
    assert total.isnan().sum() == 1
    assert normed[2].isnan().all()
    assert normed[[0, 1, 3, 4]].isfinite().all()


def test_bitwise_repeatable_on_any_number_of_threads():
    tensors = inputs(2000, 100)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            results.append(run(df, *tensors))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_scaling(dtype):
    grad = torch.randn(37, 251, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor(2.0**13 * 1.0007)
    scaled = df.scale_gradient(grad, scale, dtype)
    assert scaled.dtype == dtype
    assert torch.equal(scaled, reference.scale_gradient(grad, scale, dtype))
    scaled[3, 5], scaled[4, 6], scaled[36, 250] = float("nan"), float("inf"), float("-inf")
    back = df.unscale_gradient(scaled.t(), scale)
    assert torch.equal(back, reference.unscale_gradient(scaled.t(), scale))
    assert back.dtype == torch.float32
    assert back[5, 3] == back[6, 4] == back[250, 36] == 0
    assert df.scale_gradient(grad[:0], scale, dtype).shape == (0, 251)


def test_float16_overflow_is_filtered():
    scaled = df.scale_gradient(torch.tensor([1.0, 100.0]), torch.tensor(2.0**13), torch.float16)
    assert scaled.isinf().tolist() == [False, True]
    assert df.unscale_gradient(scaled, torch.tensor(2.0**13)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 4).half()}, TypeError, "x: expected float32 or float64, got torch.float16"),
        ({"x": torch.zeros(0, 4)}, ValueError, r"x: expected a non-empty \[..., D\], got \[0, 4\]"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected a non-empty"),
        ({"branch": torch.zeros(4)}, ValueError, r"branch: expected \[2, 4\], got \[4\]"),
        ({"branch": torch.zeros(2, 4).double()}, TypeError, "branch: expected torch.float32, .* got torch.float64"),
        ({"dtype": torch.int32}, TypeError, "dtype: expected torch.float32, .* got torch.int32"),
        ({"weight": torch.zeros(1)}, ValueError, r"weight: expected \[4\], got \[1\]"),
        ({"bias": torch.zeros(4).half()}, TypeError, "bias: expected torch.float32, got torch.float16"),
    ],
)
def test_bad_input(change, error, message):
    x = torch.zeros(2, 4)
    arguments = {"x": x, "branch": x, "weight": torch.ones(4), "bias": torch.zeros(4), **change}
    with pytest.raises(error, match=message):
        df.residual_layer_norm(**arguments)


def test_bad_scale():
    grad = torch.zeros(3)
    with pytest.raises(TypeError, match=r"scale: expected float32, got torch.float64"):
        df.scale_gradient(grad, torch.tensor(1.0).double(), torch.float16)
    with pytest.raises(ValueError, match=r"scale: expected one element, got \[3\]"):
        df.unscale_gradient(grad, torch.ones(3))
    with pytest.raises(TypeError, match=r"grad: expected float32, got torch.float16"):
        df.scale_gradient(grad.half(), torch.tensor(1.0), torch.float16)
    with pytest.raises(TypeError, match=r"dtype: expected float32, bfloat16 or float16, got torch.int8"):
        df.scale_gradient(grad, torch.tensor(1.0), torch.int8)
