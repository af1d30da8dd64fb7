"""Every op against its reference in float64 on random shapes, strides, dtypes and extreme values.

``DALLE_FAST_FUZZ=1`` tries many more inputs, other ones in each run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from helpers.op_checks import HALVES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dalle_fast as df
from dalle_fast import minifloat, reference
from dalle_fast.mask import KINDS

FUZZ = os.environ.get("DALLE_FAST_FUZZ", "0") not in ("", "0")
DTYPES = [torch.float32, torch.float64, *HALVES]
SEEDS = st.integers(-(2**63), 2**63 - 1)
# Values of a tensor: normal numbers, multiplied by one of these; or few distinct ones, of which ties come.
SCALES = [0.0, 1e-45, 1e-30, 1e-4, 1.0, 30.0, 1e4]
TIES = [0.0, -0.0, 1.0, -1.0, 2.5]
EXTREMES = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-30, 1e30, -3e38, 65504.0, -65504.0]


def budget(examples: int) -> Any:
    """Settings of a test with so many examples in the normal suite, a few seconds of them."""
    return settings(
        max_examples=100 * examples if FUZZ else examples,
        derandomize=not FUZZ,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class Inputs:
    """Tensors of random strides and values, all from one seed."""

    def __init__(self, draw: st.DrawFn, device: torch.device) -> None:
        self.draw, self.device = draw, device
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**40)))

    def choose(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def whole(self, least: int, most: int) -> int:
        return self.draw(st.integers(least, most))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def pick(self, sizes: Sequence[int], values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values)[torch.randint(len(values), tuple(sizes), generator=self.generator)]

    def values(self, sizes: Sequence[int], extremes: Sequence[float] = ()) -> torch.Tensor:
        """Normal numbers of any size, or ties; a few of them extreme."""
        kind = self.choose([*SCALES, "ties"])
        normal = torch.randn(tuple(sizes), generator=self.generator)
        x = self.pick(sizes, TIES) if kind == "ties" else normal * kind
        if extremes and self.flag():
            few = torch.rand(tuple(sizes), generator=self.generator) < 0.1
            x = torch.where(few, self.pick(sizes, extremes), x)
        return x

    def laid_out(self, x: torch.Tensor) -> torch.Tensor:
        """The same values on the device, in a random order of the dimensions, with gaps, or expanded."""
        order = self.draw(st.permutations(range(x.dim())))
        pad, step = self.whole(0, 2), self.choose([1, 1, 2, 3])
        sizes = [x.shape[dim] + pad for dim in order]
        if sizes:
            sizes[-1] = sizes[-1] * step
        buffer = torch.full(sizes, torch.nan if x.is_floating_point() else 77, dtype=x.dtype, device=self.device)
        inside = [slice(0, x.shape[dim]) for dim in order]
        if inside:
            inside[-1] = slice(0, x.shape[order[-1]] * step, step)
        view = buffer[tuple(inside)].permute([order.index(dim) for dim in range(x.dim())])
        view.copy_(x)
        if x.dim() and x.numel() and self.whole(0, 9) == 0:
            dim = self.whole(0, x.dim() - 1)
            return view.narrow(dim, 0, 1).expand(x.shape)
        return view

    def tensor(self, *sizes: int, dtype: torch.dtype = torch.float32, extremes: Sequence[float] = ()) -> torch.Tensor:
        return self.laid_out(self.values(sizes, extremes).to(dtype))


def fuzz(examples: int):
    """Decorator: the test takes ``inputs``."""

    def decorate(test):
        @budget(examples)
        @given(data=st.data())
        def run(data, device):
            test(Inputs(data.draw, device))

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def assert_near(result: torch.Tensor, exact: torch.Tensor, rtol: float, atol: float = 0.0) -> None:
    """As close as ``rtol`` of the largest number, and ``atol``; in the dtype's own precision, if that is less.

    Where the float64 result is not a number, or beyond the dtype, so is the result.
    """
    assert result.shape == exact.shape
    info = torch.finfo(result.dtype)
    in_range = exact.abs() < 0.99 * info.max
    assert torch.equal(result.isnan(), exact.isnan())
    finite = in_range & ~exact.isnan()
    if not finite.any():
        return
    difference = (result.double() - exact)[finite].abs().max().item()
    largest = exact[finite].abs().max().item()
    assert difference <= max(rtol, 2 * info.eps) * largest + max(atol, 2 * info.smallest_normal)


def doubles(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().double() for x in tensors]


def gradients(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]):
    return torch.autograd.grad(
        [y for y in outputs if y.requires_grad],
        inputs,
        [w.to(y.dtype) for y, w in zip(outputs, weights, strict=True) if y.requires_grad],
    )


# ------------------------------------------------------------------------------------------------ attention


def any_mask(inputs: Inputs) -> df.AttentionMask:
    kernel = 2 * inputs.whole(0, 5) + 1
    return df.AttentionMask(inputs.choose(KINDS), inputs.whole(0, 9), inputs.whole(1, 6), inputs.whole(1, 6), kernel)


@fuzz(60)
def test_sparse_attention(inputs):
    mask, dtype = any_mask(inputs), inputs.choose(DTYPES)
    sizes = (inputs.whole(1, 2), inputs.whole(1, 3), mask.seq_len, inputs.choose([1, 2, 3, 7, 8, 16, 33, 64]))
    q, k, v = (inputs.tensor(*sizes, dtype=dtype) for _ in range(3))
    dout = inputs.tensor(*sizes, dtype=dtype)
    scale = inputs.choose([None, 1.0, 0.0, -0.3, 1e-3])
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = df.sparse_attention(*leaves, mask, scale)
    exact_leaves = [x.requires_grad_() for x in doubles(q, k, v)]
    exact = reference.sparse_attention(*exact_leaves, mask, scale)
    size = (q.abs().max() * k.abs().max()).item() * sizes[-1] * abs(sizes[-1] ** -0.5 if scale is None else scale)
    digits = torch.finfo(torch.float32 if dtype in HALVES else dtype).eps
    sure = 4 * size * digits  # rounding of the scores, and so of their exponentials
    if sure > 0.01:
        assert out.isfinite().all()
        return
    assert_near(out, exact.detach(), 32 * digits + sure)
    grads = torch.autograd.grad(out, leaves, dout)
    rounding = torch.finfo(dtype).eps
    for grad, wanted, scaled in zip(
        grads, torch.autograd.grad(exact, exact_leaves, dout.double()), (k, q, None), strict=True
    ):
        # dS = P (dP - delta): of numbers as large as dout and v together.
        reach = 1.0 if scaled is None else (scaled.abs().max() * v.abs().max() * sizes[-1]).item() * 2
        largest = reach * dout.abs().max().item() * mask.seq_len * max(1.0, abs(scale or 1.0))
        assert torch.isfinite(wanted).all()
        difference = (grad.double() - wanted).abs().max().item()
        assert difference <= (64 * rounding + sure) * largest + 4 * torch.finfo(dtype).smallest_normal


@fuzz(60)
def test_decode_attention(inputs):
    mask, dtype = any_mask(inputs), inputs.choose(DTYPES)
    prompts, repeat, heads = inputs.whole(1, 2), inputs.whole(1, 9), inputs.whole(1, 3)
    channels = inputs.choose([1, 2, 3, 8, 16, 33, 64])
    q, k, v = (inputs.tensor(prompts * repeat, heads, channels, dtype=dtype) for _ in range(3))
    text = [inputs.tensor(prompts, heads, mask.text_len, channels, dtype=dtype) for _ in range(2)]
    values = [inputs.values((prompts * repeat, heads, mask.cache_len, channels)).to(dtype) for _ in range(2)]
    order = inputs.draw(st.permutations(range(4)))
    inverse = [order.index(dim) for dim in range(4)]
    caches = [x.to(inputs.device).permute(order).contiguous().permute(inverse) for x in values]
    position = torch.tensor(inputs.whole(0, mask.image_len - 1), device=inputs.device)
    exact_caches = doubles(*caches)
    exact = reference.decode_attention(*doubles(q, k, v, *text), *exact_caches, position, mask)
    out = df.decode_attention(q, k, v, *text, *caches, position, mask)
    for cache, wanted in zip(caches, exact_caches, strict=True):
        assert torch.equal(cache.double(), wanted)
    keys = max(x.abs().max().item() for x in (k, caches[0], *text[:1]) if x.numel())
    digits = torch.finfo(torch.float32 if dtype in HALVES else dtype).eps
    sure = 4 * q.abs().max().item() * keys * channels**0.5 * digits
    if sure <= 0.01:
        assert_near(out, exact, 32 * digits + sure)
    assert out.isfinite().all()


# ------------------------------------------------------------------------------------------------ sampling


@fuzz(150)
def test_sample(inputs):
    rows, codes = inputs.whole(1, 4), inputs.choose([1, 2, 3, 5, 17, 64, 513, 1100])
    dtype = inputs.choose([torch.float32, *HALVES])
    values = inputs.values((rows, codes), [*EXTREMES, -math.inf]).to(dtype)
    values[values == math.inf] = 1.0
    values[:, -1] = inputs.choose([0.0, -0.0, 1.0, -1e-45, 3e4])
    logits = inputs.laid_out(values)
    options = {
        "temperature": inputs.choose([1e-300, 1e-40, 1e-3, 0.5, 1.0, 3.0, 1e30, 1e300]),
        "top_k": inputs.choose([None, 1, 2, codes, 10**6, inputs.whole(1, 1100)]),
        "top_p": inputs.choose([None, 1.0, 1e-300, 0.5, 0.999, 1 - 2**-52, inputs.draw(st.floats(1e-6, 1.0))]),
        "first": inputs.choose([0, 1, 2**40 + 3, 2**63 - 1 - rows * (codes + 3)]),
        "pitch": inputs.choose([None, codes, codes + 3]),
    }
    seed = inputs.draw(SEEDS)
    assert torch.equal(df.sample(logits, seed, **options), reference.sample(logits, seed, **options))


@fuzz(60)
def test_noise(inputs):
    n, seed = inputs.whole(0, 300), inputs.draw(SEEDS)
    first = inputs.draw(st.integers(0, 2**63 - 1 - n) | st.just(2**63 - 1 - n) | st.integers(0, 9))
    drawn = torch.ops.dalle_fast.philox_uniform(torch.tensor(seed, device=inputs.device), first, n)
    index = torch.arange(n, device=inputs.device) + first
    assert torch.equal(drawn, reference.uniform(seed, index))


# ------------------------------------------------------------------------------------------------ quantization


@fuzz(80)
def test_gumbel(inputs):
    """Both ops; infinities and NaN give NaN where the reference does, and nowhere else."""
    dtype, tau = inputs.choose(DTYPES), inputs.choose([1.0, 0.5, 0.0625, 3.0])
    batch, height, width = inputs.whole(1, 2), inputs.whole(1, 5), inputs.whole(1, 9)
    codes, channels = inputs.choose([1, 2, 5, 64, 65, 130]), inputs.choose([1, 3, 16, 17])
    values = 3 * torch.randn(batch, codes, height, width, generator=inputs.generator)
    special = inputs.choose([None, [-0.0, 0.0, 1e-45], [-math.inf], [math.nan, math.inf, -math.inf], [80.0, -90.0]])
    if special:
        few = torch.rand(values.shape, generator=inputs.generator) < inputs.choose([0.02, 0.9])
        values = torch.where(few, inputs.pick(values.shape, special), values)
    logits = inputs.laid_out(values.to(dtype)).detach().requires_grad_()
    codebook = inputs.laid_out(torch.randn(codes, channels, generator=inputs.generator).to(dtype)).detach()
    seed, hard = inputs.draw(SEEDS), inputs.flag()
    exact_logits, exact_codebook = (x.requires_grad_() for x in doubles(logits, codebook))
    codebook.requires_grad_()
    y, kl = df.gumbel_softmax(logits, tau, seed, hard)
    z, kl_again, drawn = df.gumbel_quantize(logits, codebook, tau, seed, hard)
    exact_y, exact_kl = reference.gumbel_softmax(exact_logits, tau, seed, hard)
    exact_z, _, exact_drawn = reference.gumbel_quantize(exact_logits, exact_codebook, tau, seed, hard)
    known = ~exact_y.isnan().any(1)
    assert torch.equal(drawn[known], exact_drawn[known])
    assert_near(y.detach(), exact_y.detach(), 1e-3, 1e-5)
    assert_near(z.detach(), exact_z.detach(), 1e-3, 1e-4)
    for ours in (kl, kl_again):
        sure = exact_kl.isfinite()
        torch.testing.assert_close(ours[sure].double(), exact_kl[sure], rtol=1e-4, atol=1e-3)
    if not (logits.isfinite().all() and exact_kl.isfinite().all()):
        return
    weights = [torch.randn(x.shape, generator=inputs.generator).to(inputs.device) for x in (y, kl, z)]
    ours = gradients([y, kl, z], [logits, codebook], [weights[0].to(dtype), weights[1], weights[2].to(dtype)])
    theirs = gradients(
        [exact_y, exact_kl, exact_z],
        [exact_logits, exact_codebook],
        [weights[0].to(dtype).double(), weights[1], weights[2].to(dtype).double()],
    )
    for grad, wanted in zip(ours, theirs, strict=True):
        assert_near(grad, wanted, 16 * torch.finfo(dtype).eps + 1e-3, 1e-4 + 16 * torch.finfo(dtype).eps)


# ------------------------------------------------------------------------------------------------ resblocks


@fuzz(80)
def test_residual_layer_norm(inputs):
    stream = inputs.choose([torch.float32, torch.float64])
    sizes = (*(inputs.whole(1, 5) for _ in range(inputs.whole(0, 3))), inputs.choose([1, 2, 7, 16, 65, 300]))
    scale = inputs.choose([1e-4, 1.0, 1e4])
    branch_dtype, normed_dtype = (inputs.choose([stream, *HALVES]) for _ in range(2))
    x = inputs.laid_out(scale * torch.randn(sizes, generator=inputs.generator).to(stream))
    branch = inputs.choose([None, inputs.tensor(*sizes, dtype=branch_dtype)])
    weight, bias = (inputs.tensor(sizes[-1], dtype=stream, extremes=[0.0, -0.0, 1e-45]) for _ in range(2))
    eps = inputs.choose([1e-5, 1e-12, 1.0, 1e30])
    gate = [torch.tensor(g, device=inputs.device) for g in (inputs.choose([2.0, 1e5]), inputs.choose([2.0, 1e5]))]
    scaled = inputs.flag()

    def run(ops, tensors):
        leaves = [t.detach().requires_grad_() for t in tensors if t is not None]
        rest = iter(leaves)
        given = [None if t is None else next(rest) for t in tensors]
        flag = torch.zeros(1, dtype=torch.int32, device=inputs.device)
        extra = (gate[0], gate[1] if branch is not None else None, flag) if scaled else (None, None, None)
        total, normed = ops.residual_layer_norm(*given, eps, normed_dtype, *extra)
        return leaves, total, normed, flag

    tensors = (x, branch, weight, bias)
    leaves, total, normed, flag = run(df, tensors)
    wide = [None if t is None else t.double() for t in tensors]
    exact_total = wide[0] if branch is None else wide[0] + wide[1]
    exact = torch.nn.functional.layer_norm(exact_total, sizes[-1:], wide[2], wide[3], eps)
    digits = torch.finfo(stream).eps
    assert_near(total.detach(), exact_total, 4 * digits)
    spread = exact_total.std(-1, unbiased=False, keepdim=True)
    lost = digits * exact_total.abs().amax(-1, keepdim=True) / (spread.square() + eps).sqrt()  # of close numbers
    reach = (1 + lost) * wide[2].abs().max() * exact_total.shape[-1] ** 0.5 + wide[3].abs().max()
    allowed = (64 * digits + 8 * lost + 2 * torch.finfo(normed_dtype).eps) * reach
    beyond = exact.abs() > 0.99 * torch.finfo(normed_dtype).max
    close = (normed.detach().double() - exact).abs() <= allowed + 4 * torch.finfo(normed_dtype).smallest_normal
    assert (close | beyond).all()
    weights = [torch.randn(sizes, generator=inputs.generator).to(inputs.device) for _ in range(2)]
    ours = gradients([total, normed], leaves, weights)
    # The reference of the scaled backward is the same in its dtypes.
    theirs_leaves, theirs_total, theirs_normed, theirs_flag = run(reference, tensors)
    theirs = gradients([theirs_total, theirs_normed], theirs_leaves, weights)
    assert torch.equal(flag, theirs_flag)
    if lost.max() < 1e-5:
        for grad, wanted in zip(ours, theirs, strict=True):
            assert_near(grad, wanted.double(), 1e-3 + 8 * torch.finfo(grad.dtype).eps, 1e-4)


@fuzz(80)
def test_scaling_of_gradients(inputs):
    """The same bits, whatever the numbers: denormal ones, infinities and NaN."""
    sizes = [inputs.whole(0, 9) for _ in range(inputs.whole(0, 3))]
    dtype = inputs.choose([torch.float32, *HALVES])
    extremes = [*EXTREMES, math.inf, -math.inf, math.nan]
    grad, scale = inputs.tensor(*sizes, extremes=extremes), torch.tensor(inputs.choose([1.0, 8192.0, 2.0**24, 3.7]))
    scale = scale.to(inputs.device)
    for ours, theirs in (
        (df.scale_gradient(grad, scale, dtype), reference.scale_gradient(grad, scale, dtype)),
        (df.unscale_gradient(grad.to(dtype), scale), reference.unscale_gradient(grad.to(dtype), scale)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@fuzz(40)
def test_update_scales(inputs):
    n, replicas = inputs.whole(1, 40), inputs.choose([1, 2, 64])
    state = [
        replicas * 2.0 ** (7 + 17 * torch.rand(n, generator=inputs.generator)),
        torch.randint(126, (n,), generator=inputs.generator, dtype=torch.int32),
        inputs.pick((n,), [0, 1, 7, -3]).to(torch.int32),
    ]
    ours, theirs = ([x.to(inputs.device, copy=True) for x in state] for _ in range(2))
    df.update_scales(*ours, replicas)
    reference.update_scales(*theirs, replicas)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
    assert torch.equal(ours[1], theirs[1])
    assert not ours[2].any()


# ------------------------------------------------------------------------------------------------ linear layers


@fuzz(60)
def test_packed_linear(inputs):
    if inputs.device.type != "cpu":
        return  # a CPU op
    out, features = inputs.choose([1, 3, 16, 17, 50]), inputs.choose([1, 2, 5, 16, 63, 200])
    format = inputs.choose(["float32", "bfloat16", "int8"])
    weight = inputs.tensor(out, features, extremes=[0.0, -0.0, 1e-38, 100.0])
    x = inputs.tensor(*(inputs.whole(0, 3) for _ in range(inputs.whole(0, 2))), features, extremes=EXTREMES[:6])
    bias = inputs.choose([None, inputs.tensor(out)])
    result = df.packed_linear(x, df.pack_linear(weight, format), bias)
    packed = reference.pack_linear(weight, format)
    exact = reference.packed_linear(x.double(), packed, None if bias is None else bias.double())
    reach = reference.packed_linear(x.double().abs(), (packed[0].abs(), *packed[1:]), None) + exact.abs()
    assert result.shape == exact.shape
    assert ((result.double() - exact).abs() <= 1e-5 * reach + 1e-37).all()


# ------------------------------------------------------------------------------------------------ optimizer


def moments(inputs: Inputs, sizes: Sequence[int], layout: torch.memory_format) -> list[torch.Tensor]:
    values = 10.0 ** inputs.whole(-6, 0) * torch.randn(tuple(sizes), generator=inputs.generator)
    codes = [minifloat.encode(values, "1-6-9"), minifloat.encode(values.square(), "0-6-10")]
    return [code.view(torch.int16).to(inputs.device).contiguous(memory_format=layout) for code in codes]


@fuzz(60)
def test_adamw16(inputs):
    n = inputs.whole(1, 5)
    lists: list[list[torch.Tensor]] = [[], [], [], []]
    for _ in range(n):
        sizes = [inputs.whole(0, 9) for _ in range(inputs.whole(0, 4))]
        last = len(sizes) == 4 and inputs.flag()
        layout = torch.channels_last if last else torch.contiguous_format
        param = inputs.values(sizes).clamp(-100, 100).to(inputs.device).contiguous(memory_format=layout)
        grad = inputs.tensor(*sizes, extremes=[0.0, -0.0, 1e-45, 1e-20, -1e-30, 1e4])
        for tensors, tensor in zip(lists, (param, grad, *moments(inputs, sizes, layout)), strict=True):
            tensors.append(tensor)
    options = {
        "step": inputs.choose([1, 2, 1000, 10**7]),
        "lr": inputs.choose([0.0, 1e-8, 1e-3, 1.0]),
        "beta1": inputs.choose([0.0, 0.9, 0.999]),
        "beta2": inputs.choose([0.0, 0.96, 0.9999]),
        "eps": inputs.choose([1e-8, 1e-4]),
        "weight_decay": inputs.choose([0.0, 0.045]),
        "unscale": inputs.choose([None, torch.rand(n, generator=inputs.generator).to(inputs.device)]),
        "clip": inputs.choose([None, torch.tensor([0.3], device=inputs.device)]),
        "skip": inputs.choose([None, (torch.rand(n, generator=inputs.generator) < 0.5).to(inputs.device)]),
    }
    theirs = [[x.clone(memory_format=torch.preserve_format) for x in tensors] for tensors in lists]
    df.adamw16(*lists, **options)
    reference.adamw16(*theirs, **options)
    for i in range(n):
        reach = 1 + theirs[0][i].abs()
        assert ((lists[0][i] - theirs[0][i]).abs() <= 1e-4 * reach).all()
        for mine, wanted in ((lists[2][i], theirs[2][i]), (lists[3][i], theirs[3][i])):
            mine, wanted = (x.to(torch.int32) & 0x7FFF for x in (mine, wanted))  # one code apart, by rounding
            assert ((mine - wanted).abs() <= 1).all()


@fuzz(60)
def test_gradient_norm(inputs):
    n = inputs.whole(1, 5)
    extremes = [*EXTREMES, math.nan, math.inf]
    grads = [
        inputs.tensor(*(inputs.whole(0, 9) for _ in range(inputs.whole(0, 4))), extremes=extremes) for _ in range(n)
    ]
    unscale = inputs.choose([None, torch.rand(n, generator=inputs.generator).to(inputs.device)])
    skip = inputs.choose([None, (torch.rand(n, generator=inputs.generator) < 0.5).to(inputs.device)])
    norm, skipped = df.gradient_norm(grads, unscale, skip)
    exact_norm, exact_skipped = reference.gradient_norm(grads, unscale, skip)
    torch.testing.assert_close(norm, exact_norm, rtol=1e-6, atol=0)
    assert torch.equal(skipped, exact_skipped)
