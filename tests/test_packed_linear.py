"""Linear layers with packed weights, against the product with the rounded weight in float64."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.op_checks import normal, same_on_any_number_of_threads, surrounded
from helpers.tolerances import FORWARD, error
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dalle_fast as df
from dalle_fast import reference

FORMATS = ["float32", "bfloat16", "int8"]


def inputs(*shape, out, seed=0):
    """x [..., in], weight [out, in], bias [out]."""
    return [normal(*size, seed=seed + i) for i, size in enumerate([shape, (out, shape[-1]), (out,)])]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    in_features=st.integers(1, 70),
    out=st.integers(1, 200),
    format=st.sampled_from(FORMATS),
    with_bias=st.booleans(),
)
@example(rows=64, in_features=515, out=130, format="float32", with_bias=True)
@example(rows=64, in_features=515, out=130, format="bfloat16", with_bias=True)
@example(rows=64, in_features=515, out=130, format="int8", with_bias=True)
def test_matches_float64(rows, in_features, out, format, with_bias):
    x, weight, bias = inputs(rows, in_features, out=out)
    bias = bias if with_bias else None
    result = df.packed_linear(x, df.pack_linear(weight, format), bias)
    packed = reference.pack_linear(weight, format)
    exact = reference.packed_linear(x.double(), packed, None if bias is None else bias.double())
    assert result.dtype == torch.float32
    assert error(result, exact) <= FORWARD


@pytest.mark.parametrize("format", FORMATS)
def test_stored_weights_are_the_rounded_ones(format):
    """Rows of the identity read the weights back, one at a time: the bits are those of the reference."""
    weight = inputs(37, out=50)[1]
    weight[3] = 0
    weight[4] = normal(37) * 1e-43  # denormals: a scale of very few bits
    weight[5, :4] = torch.tensor([127.0, 2.5, -3.5, 0.5])  # half of a step goes to the even one
    packed = df.pack_linear(weight, format)
    stored, scales, *_ = reference.pack_linear(weight, format)
    back = df.packed_linear(torch.eye(37), packed).t()
    assert torch.equal(packed.scales, scales)
    assert torch.equal(back, stored.float() * scales[:, None] if format == "int8" else stored.float())


@pytest.mark.parametrize("format", FORMATS)
def test_int8_is_within_half_a_step(format):
    weight = inputs(64, out=48)[1] * torch.logspace(-3, 3, 48)[:, None]
    back = df.packed_linear(torch.eye(64), df.pack_linear(weight, format)).t()
    step = {"float32": 0.0, "bfloat16": 2.0**-7, "int8": 1 / 127}[format]  # of a row's largest weight
    assert ((back - weight).abs().amax(1) <= 0.5001 * step * weight.abs().amax(1)).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("out", [16, 200])
def test_a_row_does_not_depend_on_the_others(format, out):
    """A candidate's result does not depend on the number of candidates."""
    x, weight, bias = inputs(64, 131, out=out)
    packed = df.pack_linear(weight, format)
    whole = df.packed_linear(x, packed, bias)
    for rows in range(1, 64):
        assert torch.equal(df.packed_linear(x[:rows], packed, bias), whole[:rows])


@pytest.mark.parametrize("format", FORMATS)
def test_same_bits_on_any_number_of_threads(format):
    x, weight, bias = inputs(5, 512, out=1000)
    same_on_any_number_of_threads(lambda: [df.packed_linear(x, df.pack_linear(weight, format), bias)])


@pytest.mark.parametrize("format", FORMATS)
def test_shapes(format):
    x, weight, bias = inputs(2, 3, 20, out=33)
    packed = df.pack_linear(weight, format)
    assert packed.in_features == 20 and packed.out_features == 33 and packed.format == format
    flat = df.packed_linear(x.view(6, 20), packed, bias)
    assert torch.equal(df.packed_linear(x, packed, bias), flat.view(2, 3, 33))
    assert torch.equal(df.packed_linear(x[1, 2], packed, bias), flat[5])
    assert df.packed_linear(x[:0], packed, bias).shape == (0, 3, 33)


@pytest.mark.parametrize("format", FORMATS)
def test_strided_and_surrounded_by_nan(format):
    x, weight, bias = inputs(7, 21, out=35)
    expected = df.packed_linear(x, df.pack_linear(weight, format), bias)
    x, weight = (surrounded(plain, pad=1, step=2, order=(1, 0)) for plain in (x, weight))
    bias = surrounded(bias, pad=1, step=2)
    assert torch.equal(df.packed_linear(x, df.pack_linear(weight, format), bias), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_nan_stays_in_its_row(format):
    x, weight, bias = inputs(9, 30, out=20)
    x[4, 29] = float("nan")
    result = df.packed_linear(x, df.pack_linear(weight, format), bias)
    assert result[4].isnan().all()
    assert result[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
def test_opcheck(format):
    x, weight, bias = inputs(3, 21, out=18)
    dtype = getattr(torch, format)
    panels, scales = torch.ops.dalle_fast.pack_linear(weight, dtype)
    torch.library.opcheck(torch.ops.dalle_fast.pack_linear.default, (weight, dtype))
    for b in (bias, None):
        torch.library.opcheck(torch.ops.dalle_fast.packed_linear.default, (x, panels, scales, b, 18))


def test_no_gradients():
    x, weight, bias = inputs(2, 8, out=4)
    packed = df.pack_linear(weight.requires_grad_())
    for tensors in ((x.requires_grad_(), None), (x.detach(), bias.requires_grad_())):
        with pytest.raises(RuntimeError, match=r"packed_linear has no gradients: call it under torch.no_grad\(\)"):
            df.packed_linear(tensors[0], packed, tensors[1])
        with torch.no_grad():
            assert not df.packed_linear(tensors[0], packed, tensors[1]).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(4, 8).double()}, TypeError, "weight: expected torch.float32, got torch.float64"),
        ({"weight": torch.zeros(8)}, ValueError, r"weight: expected \[out, in\], got \[8\]"),
        ({"weight": torch.zeros(0, 8)}, ValueError, r"weight: expected a non-empty \[out, in\], got \[0, 8\]"),
        ({"weight": torch.full((4, 8), float("inf"))}, ValueError, "weight: expected finite values for int8"),
        ({"format": "int4"}, ValueError, "format: expected one of float32, bfloat16, int8, got 'int4'"),
        ({"x": torch.zeros(2, 8).half()}, TypeError, "x: expected torch.float32, got torch.float16"),
        ({"x": torch.zeros(2, 9)}, ValueError, r"x: expected \[..., 8\], got \[2, 9\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x: expected \[..., 8\], got \[\]"),
        ({"x": torch.zeros(2, 8, device="meta")}, ValueError, "x: expected a tensor on cpu, got one on meta"),
        ({"bias": torch.zeros(4).double()}, TypeError, "bias: expected torch.float32, got torch.float64"),
        ({"bias": torch.zeros(1)}, ValueError, r"bias: expected \[4\], got \[1\]"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"x": torch.zeros(2, 8), "weight": torch.ones(4, 8), "bias": torch.zeros(4), "format": "int8", **change}
    with pytest.raises(error, match=message):
        df.packed_linear(arguments["x"], df.pack_linear(arguments["weight"], arguments["format"]), arguments["bias"])


def test_the_op_itself_guards_memory():
    """The compiled op can be called directly: a buffer of another size is an error, not a read beyond its end."""
    x, weight, bias = inputs(3, 21, out=18)
    panels, scales = torch.ops.dalle_fast.pack_linear(weight, torch.int8)
    op = torch.ops.dalle_fast.packed_linear
    for arguments, message in [
        ((x, panels[:1].clone(), scales, bias, 18), "panels: expected int8 [2, 6, 64] on cpu, got int8 [1, 6, 64] on"),
        ((x, panels, scales[:5].clone(), bias, 18), "scales: expected float32 [18] on cpu, got float32 [5] on cpu"),
        ((x, panels, scales, bias[:5].clone(), 18), "bias: expected float32 [18] on cpu, got float32 [5] on cpu"),
        ((x.double(), panels, scales, bias, 18), "x: expected float32 [3, 21] on cpu, got float64 [3, 21] on cpu"),
    ]:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            op(*arguments)
