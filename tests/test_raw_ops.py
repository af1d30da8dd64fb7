"""Ops called without the checks of their Python functions: what guards memory is checked in C++."""

from __future__ import annotations

import pytest
import torch
from helpers.op_checks import normal

import dalle_fast as df
from dalle_fast import reference
from dalle_fast.ops._library import waits_on_host
from dalle_fast.ops.sparse_attention import mask_args

ops = torch.ops.dalle_fast
MASK = df.AttentionMask("row", 4, 3, 3)
HUGE = 2**32 + 1  # one, as an int of 32 bits

pytestmark = pytest.mark.skipif(waits_on_host("sample", torch.device("cpu")), reason="the kernels are not built")


# ------------------------------------------------------------------------------------------------ adamw16


def adamw16(params, grads=None, means=None, variances=None, op=ops.adamw16, **options):
    """One step; what is not given lies as the parameters do."""
    device, n = params[0].device, len(params)
    grads = [torch.ones_like(x) for x in params] if grads is None else grads
    means = [torch.zeros_like(x, dtype=torch.int16) for x in params] if means is None else means
    variances = [torch.zeros_like(x, dtype=torch.int16) for x in params] if variances is None else variances
    given = {"step": torch.tensor([1]), "lr": torch.tensor([0.1]), "weight_decay": torch.zeros(n), **options}
    given = {name: value.to(device) for name, value in given.items()}
    op(params, grads, means, variances, beta1=0.9, beta2=0.95, eps=1e-8, unscale=None, clip=None, skip=None, **given)


def like(x, dtype=torch.float32):
    """A tensor with the strides of x."""
    buffer = torch.zeros(sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1)
    return buffer.to(x.device, dtype).as_strided(x.shape, x.stride())


SPARSE = {
    "expanded": lambda x: x[:1].expand(1000),
    "every second": lambda x: x[::2],
    "columns": lambda x: x.view(100, 10)[:, :5],
    "rows of a stack": lambda x: x.view(10, 10, 10)[:, :3],
    "expanded rows": lambda x: x[:10].expand(100, 10),
    "overlapping windows": lambda x: x.as_strided((10, 10), (5, 1)),
    "holes that repeats fill": lambda x: x.as_strided((3, 3), (1, 1)),
    "four dimensions": lambda x: x.view(2, 5, 10, 10)[:, :4].permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("view", SPARSE.values(), ids=SPARSE)
def test_adamw16_updates_dense_parameters_only(view, device):
    base = normal(1000, device=device)
    before = base.clone()
    param = view(base)
    moments = [like(param, torch.int16) for _ in range(2)]
    with pytest.raises(RuntimeError, match="params: expected dense memory"):
        adamw16([param], [like(param)], [moments[0]], [moments[1]])
    assert torch.equal(base, before)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_adamw16_takes_dense_parameters_of_any_order(order, device):
    param = normal(4, 3, 1, 5, device=device).permute(order)
    wanted = param.clone(memory_format=torch.contiguous_format)
    adamw16([param])
    adamw16([wanted])
    assert torch.equal(param, wanted)


def test_adamw16_refuses_tensors_that_overlap(device):
    base = normal(64, device=device)
    moments = torch.zeros(32, dtype=torch.int16, device=device)
    before = base.clone()
    for overlapping in (
        {"params": [base[:32], base[:32]]},
        {"params": [base[:32], base[31:63]]},
        {"params": [base[8:16], base, base[40:41]]},
        {"params": [base[:32]], "grads": [base[:32]]},
        {"params": [base[:32]], "grads": [base[16:48]]},
        {"params": [base[:32]], "lr": base[3:4]},
        {"params": [base[:32]], "means": [moments], "variances": [moments]},
        {"params": [base[:16]], "means": [moments[:16]], "variances": [moments[1:17]]},
        {"params": [base[:32]], "means": [base[:16].view(torch.int16)]},
    ):
        with pytest.raises(RuntimeError, match="params, means, variances: expected tensors that do not overlap"):
            adamw16(**overlapping)
    assert torch.equal(base, before)


def test_adamw16_takes_neighbours(device):
    """Parts of one buffer that touch, an empty one, and the same gradient for many."""
    base = normal(64, device=device)
    params, grad = [base[32:], base[:0], base[:32], base[5:5]], torch.ones(32, device=device)
    wanted = [x.clone() for x in params]
    grads = [grad, grad[:0], grad, grad[:0]]
    adamw16(params, grads)
    adamw16(wanted, grads)
    for param, right in zip(params, wanted, strict=True):
        assert torch.equal(param, right)


def test_the_public_adamw16_refuses_overlapping_parameters():
    param, other = torch.ones(8), torch.ones(8)
    moments = [torch.zeros(8, dtype=torch.int16) for _ in range(4)]
    with pytest.raises(RuntimeError, match="do not overlap"):
        df.adamw16([param, param], [other, other], moments[:2], moments[2:], 1, 0.1, 0.9, 0.95, 1e-8, 0.0)
    assert torch.equal(param, other)


@pytest.mark.parametrize("view", SPARSE.values(), ids=SPARSE)
def test_gradient_norm_reads_contiguous_gradients_only(view, device):
    with pytest.raises(RuntimeError, match="grads: expected contiguous memory"):
        ops.gradient_norm([view(normal(1000, device=device))], None, None)


# ------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("sizes", [(HUGE, 1), (1, HUGE), (2**16, 2**16), (2**31 // 13 + 1, 1)])
def test_sparse_attention_counts_in_an_int(sizes, device):
    q = torch.zeros(1, 1, 13, 1, device=device).expand(*sizes, 13, 1)
    with pytest.raises(RuntimeError, match="q: rows of all batches and heads: expected at most"):
        ops.sparse_attention(q, q, q, *mask_args(MASK), 1.0)
    with pytest.raises(RuntimeError, match="q: rows of all batches and heads: expected at most"):
        ops.sparse_attention_backward(q, q, q, q, q, q[..., 0], *mask_args(MASK), 1.0)
    wide = torch.zeros(1, 1, 13, 1, device=device).expand(1, 1, 13, HUGE)
    with pytest.raises(RuntimeError, match="q: D: expected at most"):
        ops.sparse_attention(wide, wide, wide, *mask_args(MASK), 1.0)


def decode(cache_k, cache_v, q=None, op=df.decode_attention):
    q = torch.ones(2, 1, 8, dtype=cache_k.dtype) if q is None else q
    text = torch.zeros(1, q.shape[1], 4, q.shape[2])
    return op(q, q, q, text, text, cache_k, cache_v, torch.tensor(1), MASK)


@pytest.mark.parametrize("sizes", [(HUGE, 1, 8), (1, HUGE, 8), (2**16, 2**16, 8), (1, 1, HUGE)])
def test_decode_attention_counts_in_an_int(sizes):
    q = torch.zeros(1, 1, 1).expand(sizes)
    text = torch.zeros(1, 1, 1, 1).expand(1, sizes[1], 4, sizes[2])
    cache = torch.zeros(1, 1, 1, 1).expand(*sizes[:2], MASK.cache_len, sizes[2])
    with pytest.raises(RuntimeError, match=r"q: (D|rows of all batches and heads): expected at most"):
        ops.decode_attention(q, q, q, text, text, cache, cache, torch.tensor(1), *mask_args(MASK), 1.0)


SIZES = (2, 1, MASK.cache_len, 8)
COUNT = torch.Size(SIZES).numel()


def test_decode_attention_refuses_caches_that_overlap():
    one, buffer = torch.zeros(SIZES), torch.zeros(4 * COUNT)
    shifted = buffer[4 : 4 + COUNT].view(SIZES)
    for cache_k, cache_v in (
        (one, one),
        (one, one.view(SIZES)),
        (one[:1].expand(SIZES), torch.zeros(SIZES)),
        (torch.zeros(SIZES), torch.zeros(1).expand(SIZES)),
        (torch.zeros(SIZES), buffer.as_strided(SIZES, (8, 8, 8, 1))),
        (buffer[:COUNT].view(SIZES), shifted),
        (buffer[:COUNT].view(SIZES), buffer.as_strided(SIZES, (COUNT, 1, 8, 1), 8)),
        (buffer.as_strided(SIZES, (1, 1, 16, 2)), buffer.as_strided(SIZES, (1, 1, 16, 2), 2)),
    ):
        with pytest.raises(RuntimeError, match=r"cache_[kv]: expected .* that do not overlap in memory"):
            decode(cache_k, cache_v)
        assert not buffer.any()
        assert not one.any()


def test_decode_attention_takes_caches_of_one_buffer():
    """Halves of any dimension: of the batch, of a token, of a channel pair."""
    wanted_k, wanted_v = torch.zeros(SIZES), torch.zeros(SIZES)
    right = decode(wanted_k, wanted_v)
    for dim in range(5):
        cache_k, cache_v = torch.zeros(*SIZES[:dim], 2, *SIZES[dim:]).unbind(dim)
        assert torch.equal(decode(cache_k, cache_v), right)
        assert torch.equal(cache_k, wanted_k)
        assert torch.equal(cache_v, wanted_v)
    cache_k, cache_v = torch.zeros(2, 1, MASK.cache_len, 16).split(8, -1)
    assert torch.equal(decode(cache_k, cache_v), right)


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_decode_attention_refuses_caches_that_require_grad(grad_enabled):
    for which in range(2):
        caches = [torch.zeros(SIZES) for _ in range(2)]
        caches[which].requires_grad_()
        with torch.set_grad_enabled(grad_enabled), pytest.raises(RuntimeError, match="decode_attention"):
            decode(*caches)
        assert not caches[0].any()


# ------------------------------------------------------------------------------------------------ the others


def test_update_scales_refuses_state_that_overlaps():
    state = torch.zeros(8, dtype=torch.int32)
    for since, nonfinite in ((state, state), (state[:4], state[2:6])):
        with pytest.raises(RuntimeError, match="do not overlap"):
            ops.update_scales(torch.full((len(since),), 2.0**13), since, nonfinite, 1)
    assert not state.any()


@pytest.mark.parametrize("code", [-1, 5, 2**31, 2**40, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gumbel_quantize_backward_drops_codes_out_of_range(code, dtype):
    """A code that is none has no row of the codebook: the others' gradients stay."""
    logits, codebook = normal(2, 5, 3, 4, dtype=dtype), normal(5, 6, seed=1, dtype=dtype)
    z, kl, codes, stats, soft = ops.gumbel_quantize(logits, codebook, 0.7, torch.tensor(3), True)

    def gradients(codes):
        arguments = (torch.ones_like(z), torch.ones_like(kl), logits, codebook, codes, stats, soft)
        return ops.gumbel_quantize_backward(*arguments, 0.7, torch.tensor(3), True)

    wrong = codes.clone()
    wrong[1, 2, 3] = code
    (_, right), (grad_logits, grad_codebook) = gradients(codes), gradients(wrong)
    assert grad_logits.isfinite().all()
    right = right.clone()
    right[codes[1, 2, 3]] -= 1
    torch.testing.assert_close(grad_codebook, right)


@pytest.mark.parametrize("first, n", [(2**63 - 1, 1), (2**63 - 3, 4), (1, 2**63 - 1), (-1, 1), (0, -1)])
def test_noise_stays_within_63_bits(first, n):
    with pytest.raises(RuntimeError, match="first, n: expected 0 or more"):
        ops.philox_uniform(torch.tensor(1), first, n)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 40])
def test_the_last_noise_is_that_of_the_reference(n, device):
    first = 2**63 - 1 - n
    drawn = ops.philox_uniform(torch.tensor(1, device=device), first, n)
    assert torch.equal(drawn.cpu(), reference.uniform(1, torch.arange(n) + first))


@pytest.mark.parametrize("first, pitch", [(2**63 - 1, 9), (0, 2**62), (2**62, 2**61), (2**63 - 54, 9), (-1, 9), (0, 8)])
def test_sample_stays_within_63_bits(first, pitch):
    with pytest.raises(RuntimeError, match=r"(first|pitch): expected"):
        ops.sample(torch.zeros(6, 9), torch.tensor(1), torch.tensor(first), 1.0, 9, 1.0, pitch)


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), float("inf")])
def test_residual_layer_norm_has_a_positive_eps(eps):
    with pytest.raises(RuntimeError, match="eps: expected a finite positive number"):
        ops.residual_layer_norm(*[torch.ones(4)] * 4, eps, torch.float32, None, None, None)
