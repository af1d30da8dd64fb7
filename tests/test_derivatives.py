"""Derivatives that the kernels do not have: refused, never silently 0. The references have most of them."""

from __future__ import annotations

import pytest
import torch
from helpers.op_checks import normal

import dalle_fast as df
from dalle_fast import reference
from dalle_fast.ops._library import waits_on_host

MASK = df.AttentionMask("row", 4, 3, 3)
GATE = torch.tensor(8.0)


def grid(x):
    return x.view(1, 13, 2, 4)


# From x [13, 8] to a tensor, in the ops of the module.
DIFFERENTIABLE = {
    "sparse_attention": lambda ops, x: ops.sparse_attention(*[x.view(1, 1, 13, 8)] * 3, MASK),
    "gumbel_softmax": lambda ops, x: ops.gumbel_softmax(grid(x), 0.7, 1)[0],
    "gumbel_softmax_hard": lambda ops, x: ops.gumbel_softmax(grid(x), 0.7, 1, hard=True)[0],
    "gumbel_softmax_kl": lambda ops, x: ops.gumbel_softmax(grid(x), 0.7, 1)[1],
    "gumbel_quantize": lambda ops, x: ops.gumbel_quantize(grid(x), 1.5 * x[:, :3], 0.7, 1)[0],
    "residual_layer_norm": lambda ops, x: ops.residual_layer_norm(x, 2 * x, x[0], x[1])[1],
    "residual_layer_norm_first": lambda ops, x: ops.residual_layer_norm(x, None, x[0], x[1])[1],
    "residual_layer_norm_scaled": lambda ops, x: ops.residual_layer_norm(
        x, 2 * x, x[0], x[1], scale_in=GATE, scale_out=GATE, nonfinite=torch.zeros((), dtype=torch.int32)
    )[1],
}
SCALES = {
    "scale_gradient": lambda ops, x: ops.scale_gradient(x, GATE, torch.float32),
    "unscale_gradient": lambda ops, x: ops.unscale_gradient(x, GATE),
}
NEVER = {
    "decode_attention": lambda ops, x: ops.decode_attention(
        *[x.view(13, 1, 8)] * 3, *[torch.zeros(1, 1, 4, 8)] * 2, *torch.zeros(2, 13, 1, 4, 8), torch.tensor(1), MASK
    ),
    "packed_linear": lambda ops, x: ops.packed_linear(x, df.pack_linear(torch.eye(8))),
}
ALL = {**DIFFERENTIABLE, **SCALES, **NEVER}

pytestmark = pytest.mark.skipif(
    waits_on_host("sparse_attention", torch.device("cpu")), reason="the references are differentiable"
)


def leaf():
    return normal(13, 8).requires_grad_()


@pytest.mark.parametrize("op", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
@pytest.mark.parametrize("linear", [False, True], ids=["square", "sum"])
def test_the_second_derivative_is_refused(op, linear):
    """Also where the gradient that comes in is a constant, and other terms of the loss have derivatives."""
    x = leaf()
    y = op(df, x)
    (first,) = torch.autograd.grad(y.sum() if linear else y.square().sum(), x, create_graph=True)
    right = leaf()
    wanted = op(reference, right)
    (expected,) = torch.autograd.grad(wanted.sum() if linear else wanted.square().sum(), right)
    torch.testing.assert_close(first.detach(), expected, rtol=1e-3, atol=1e-3)  # the first is right, as ever
    with pytest.raises(RuntimeError, match="differentiable once"):
        (first.square().sum() + x.sum()).backward()


@pytest.mark.parametrize("op", SCALES.values(), ids=SCALES)
def test_scaling_of_gradients_is_not_differentiable(op):
    y = op(df, leaf())
    with pytest.raises(RuntimeError, match="not differentiable"):
        y.sum().backward()
    with torch.no_grad():
        assert not op(df, leaf()).requires_grad


@pytest.mark.parametrize("op", NEVER.values(), ids=NEVER)
def test_ops_of_sampling_have_no_gradients(op):
    with pytest.raises(RuntimeError, match="no gradients"):
        op(df, leaf())
    with torch.no_grad():
        op(df, leaf())


@pytest.mark.parametrize("op", ALL.values(), ids=ALL)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused(op, requires_grad):
    x = leaf().detach()
    with pytest.raises(RuntimeError, match=r"forward mode|no gradients"):
        torch.func.jvp(lambda y: op(df, y), (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.requires_grad_(requires_grad), torch.ones_like(x))
        with pytest.raises(RuntimeError, match=r"forward mode|no gradients"):
            op(df, dual)


@pytest.mark.parametrize("op", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_forward_mode_over_the_backward_is_refused(op):
    x, weights = leaf(), torch.ones(())
    y = op(df, x).sum()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode"):
        dual = torch.autograd.forward_ad.make_dual(weights, torch.ones(()))
        torch.autograd.grad(y, x, dual)


@pytest.mark.parametrize("op", [*DIFFERENTIABLE.values(), *SCALES.values()], ids=[*DIFFERENTIABLE, *SCALES])
def test_the_compiled_op_is_the_same(op):
    torch.compiler.reset()
    x = leaf().requires_grad_(op in DIFFERENTIABLE.values())
    y = op(df, x)
    compiled = torch.compile(lambda x: op(df, x), backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(compiled, y)
    if x.requires_grad:
        assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (compiled, y)))
