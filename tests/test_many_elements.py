"""Tensors of more elements than 32 bits count, on a GPU: their last elements give the same result as alone."""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import DEVICES
from helpers.op_checks import normal as normal_on

import dalle_fast as df
from dalle_fast import AttentionMask, reference

DEVICE = "cuda"
ELEMENTS = 2**31
BYTES = 60e9  # more than the largest test takes

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(
        "cuda" not in DEVICES or torch.cuda.get_device_properties(0).total_memory < BYTES,
        reason="needs a GPU with 60 GB",
    ),
]


@pytest.fixture(autouse=True)
def _one_at_a_time() -> Iterator[None]:
    """Test processes that run side by side share one GPU."""
    with (Path(tempfile.gettempdir()) / "dalle_fast_many_elements").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


normal = partial(normal_on, device=DEVICE)


def enough(each: int) -> int:
    """The number of parts, of ``each`` elements, that exceeds ELEMENTS by a little."""
    return ELEMENTS // each + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sparse_attention(dtype):
    mask = AttentionMask("column", text_len=40, height=8, width=8)
    heads, channels = 16, 64
    batch = enough(mask.seq_len * 3 * heads * channels)
    packed = normal(batch, mask.seq_len, 3, heads, channels, dtype=dtype).requires_grad_()

    def run(packed):
        q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
        out = df.sparse_attention(q, k, v, mask)
        return out, *torch.autograd.grad(out, (q, k, v), out.detach())

    for many, one in zip(run(packed), run(packed[-1:]), strict=True):
        assert torch.equal(many[-1:], one)


def test_decode_attention():
    mask = AttentionMask("full", text_len=8, height=16, width=16)
    heads, channels = 16, 64
    candidates = enough(heads * mask.cache_len * channels)
    new = [normal(candidates, heads, channels, seed=i, dtype=torch.bfloat16) for i in range(3)]
    text = [normal(1, heads, mask.text_len, channels, seed=i, dtype=torch.bfloat16) for i in (3, 4)]
    cache = [normal(candidates, heads, mask.cache_len, channels, seed=i, dtype=torch.bfloat16) for i in (5, 6)]
    position = torch.tensor(200, device=DEVICE)
    last = [x[-1:].clone() for x in (*new, *cache)]
    wanted = df.decode_attention(*last[:3], *text, *last[3:], position, mask)
    assert torch.equal(df.decode_attention(*new, *text, *cache, position, mask)[-1:], wanted)
    for many, one in zip(cache, last[3:], strict=True):
        assert torch.equal(many[-1:], one)


def test_sample():
    codes = 8192
    rows = enough(codes)
    logits = normal(rows, codes, dtype=torch.bfloat16)
    drawn = df.sample(logits, 3, top_k=500, top_p=0.9)
    assert torch.equal(drawn[-2:], df.sample(logits[-2:], 3, top_k=500, top_p=0.9, first=(rows - 2) * codes))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gumbel(layout):
    """The last pixel of the last image; its noise depends on the indices of its elements."""
    codes, edge, tau, seed = 8192, 32, 0.7, 5
    batch = enough(codes * edge * edge)
    logits = normal(batch, codes, edge, edge, dtype=torch.bfloat16).contiguous(memory_format=layout).requires_grad_()
    codebook = normal(codes, 64, seed=1, dtype=torch.bfloat16)
    pixels = edge * edge
    index = torch.arange(codes, device=DEVICE) * pixels + (batch - 1) * codes * pixels + pixels - 1
    noise = -(-reference.uniform(seed, index).double().log()).log()
    pixel = logits[-1, :, -1, -1].detach().double().requires_grad_()
    exact = ((pixel + noise) / tau).softmax(0)

    y, _ = df.gumbel_softmax(logits, tau, seed)
    torch.testing.assert_close(y[-1, :, -1, -1].double(), exact, rtol=1e-2, atol=1e-5)
    upstream = normal(codes, seed=2).double()
    (grad,) = torch.autograd.grad((y[-1, :, -1, -1] * upstream).sum(), logits)
    (wanted,) = torch.autograd.grad((exact * upstream).sum(), pixel, retain_graph=True)
    torch.testing.assert_close(grad[-1, :, -1, -1].double(), wanted, rtol=2e-2, atol=1e-4)
    assert grad[-1, :, -1, 0].count_nonzero() == 0
    del y, grad

    z, _, drawn = df.gumbel_quantize(logits, codebook, tau, seed)
    assert drawn[-1, -1, -1] == (pixel + noise).argmax()
    torch.testing.assert_close(z[-1, :, -1, -1].double(), exact @ codebook.double(), rtol=1e-2, atol=1e-2)
    (grad,) = torch.autograd.grad(z[-1, :, -1, -1].sum(), logits)
    (wanted,) = torch.autograd.grad((exact @ codebook.double()).sum(), pixel)
    torch.testing.assert_close(grad[-1, :, -1, -1].double(), wanted, rtol=2e-2, atol=1e-4)


def test_residual_layer_norm():
    width = 4096
    rows = enough(width)
    x, weight, bias = normal(rows, width), normal(width, seed=1), normal(width, seed=2)
    branch = normal(rows, width, seed=3, dtype=torch.float16)

    def run(x, branch):
        leaves = [tensor.detach().requires_grad_() for tensor in (x, branch)]
        total, normed = df.residual_layer_norm(*leaves, weight, bias, dtype=torch.float16)
        return [total, normed, *torch.autograd.grad(normed, leaves, normed.detach())]

    wanted = run(x[-2:], branch[-2:])
    for many, two in zip(run(x, branch), wanted, strict=True):
        assert torch.equal(many[-2:], two)


def test_gradient_scaling():
    grad, scale = normal(ELEMENTS + 5), torch.tensor(1000.0, device=DEVICE)
    scaled = df.scale_gradient(grad, scale, torch.float16)
    assert torch.equal(scaled[-5:], df.scale_gradient(grad[-5:], scale, torch.float16))
    assert torch.equal(df.unscale_gradient(scaled, scale)[-5:], df.unscale_gradient(scaled[-5:], scale))


def test_adamw16():
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.96, "eps": 1e-8, "weight_decay": 0.1}
    tensors = [normal(ELEMENTS + 5, seed=i) for i in range(2)]
    tensors += [torch.zeros(ELEMENTS + 5, dtype=torch.int16, device=DEVICE) for _ in range(2)]
    last = [x[-5:].clone() for x in tensors]
    for state in (tensors, last):
        df.adamw16(*([x] for x in state), 1, **options)
    for many, five in zip(tensors, last, strict=True):
        assert torch.equal(many[-5:], five)
    tensors[1].fill_(0.5)
    norm, _ = df.gradient_norm([tensors[1]])
    assert norm.item() == pytest.approx(0.5 * (ELEMENTS + 5) ** 0.5, rel=1e-6)
