"""Gumbel-softmax with the KL over 8192 codes on a 32 x 32 grid, and its product with a codebook, against torch's ops,
eager and compiled. The peers draw torch's own random numbers.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import dalle_fast as df

CODES, CHANNELS, EDGE = 8192, 128, 32
BATCH_CUDA = 32
ATOL = {False: 1e-5, True: 5e-3}  # gradients reach 24 and are differences of such terms


def softmax_and_kl(logits, tau):
    y = F.gumbel_softmax(logits, tau, dim=1)
    log_q = logits.log_softmax(1)
    return y, (log_q.exp() * (log_q + math.log(CODES))).sum((1, 2, 3))


def quantize(logits, codebook, tau):
    y, kl = softmax_and_kl(logits, tau)
    return (codebook.t() @ y.flatten(2)).view(len(y), CHANNELS, EDGE, EDGE), kl


def random_tensors(backward, batch=1, device="cpu"):
    """logits, codebook."""
    generator = torch.Generator(device).manual_seed(0)
    logits = 2 * torch.randn(batch, CODES, EDGE, EDGE, generator=generator, device=device)
    codebook = torch.randn(CODES, CHANNELS, generator=generator, device=device)
    return logits.requires_grad_(backward), codebook.requires_grad_(backward)


def make_step(tensors, channels):
    """A function that calls an op on the tensors: its sample and KL, or the gradients if tensors require them."""
    batch, device = len(tensors[0]), tensors[0].device
    generator = torch.Generator(device).manual_seed(1)
    upstream = (
        torch.randn(batch, channels, EDGE, EDGE, generator=generator, device=device),
        torch.ones(batch).to(device),
    )

    def step(op, dtype=torch.float32):
        inputs = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in tensors]
        sample, kl, *_ = op(*inputs)
        if not kl.requires_grad:
            return sample, kl
        return torch.autograd.grad([sample, kl], inputs, [x.to(dtype) for x in upstream])

    return step


@pytest.mark.parametrize("tau", [1.0, 1 / 16])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_softmax(race, memory, backward, tau):
    logits, _ = random_tensors(backward)
    step = make_step([logits], CODES)
    compiled = torch.compile(softmax_and_kl)
    forward_targets = {"eager": {"fresh": 25.0, "reused": 35.0}[memory], "torch.compile": 8.0}
    race(
        f"gumbel_softmax {'f+b' if backward else 'f'}, tau {tau:g}, {memory}",
        lambda: step(lambda x: df.gumbel_softmax(x, tau, 1)),
        {
            "eager": lambda: step(lambda x: softmax_and_kl(x, tau)),
            "torch.compile": lambda: step(lambda x: compiled(x, tau)),
        },
        expected=lambda: step(lambda x: df.reference.gumbel_softmax(x, tau, 1), torch.float64),
        bytes=logits.nbytes * (5 if backward else 2),  # logits and y; then logits, dy and the gradient
        targets={"eager": 20.0, "torch.compile": 5.0} if backward else forward_targets,
        rounds=5,
        atol=ATOL[backward],
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_quantize(race, memory, backward):
    step = make_step(random_tensors(backward), CHANNELS)
    race(
        f"gumbel_quantize {'f+b' if backward else 'f'}, {memory}",
        lambda: step(lambda x, c: df.gumbel_quantize(x, c, 1.0, 1)),
        {"eager": lambda: step(lambda x, c: quantize(x, c, 1.0))},
        expected=lambda: step(lambda x, c: df.reference.gumbel_quantize(x, c, 1.0, 1), torch.float64),
        flops=2 * CODES * CHANNELS * EDGE**2 * (3 if backward else 1),
        targets={"eager": 9.0},
        rounds=5,
        atol=ATOL[backward],
    )


def check_cuda(make, op, reference, backward):
    """At one image, for which float64 has room; the race is at BATCH_CUDA."""
    step = make(random_tensors(backward, 1, "cuda"))
    torch.testing.assert_close(
        step(op), step(reference, torch.float64), rtol=1e-4, atol=ATOL[backward], check_dtype=False
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_cuda_softmax(race, backward):
    seed = torch.tensor(1, device="cuda")
    compiled = torch.compile(softmax_and_kl)
    make = lambda tensors: make_step(tensors[:1], CODES)  # noqa: E731
    ours = lambda x: df.gumbel_softmax(x, 1.0, seed)  # noqa: E731
    check_cuda(make, ours, lambda x: df.reference.gumbel_softmax(x, 1.0, seed), backward)
    tensors = random_tensors(backward, BATCH_CUDA, "cuda")
    step = make(tensors)
    race(
        f"gumbel_softmax {'f+b' if backward else 'f'}, batch {BATCH_CUDA}",
        lambda: step(ours),
        {
            "eager": lambda: step(lambda x: softmax_and_kl(x, 1.0)),
            "torch.compile": lambda: step(lambda x: compiled(x, 1.0)),
        },
        expected=None,
        bytes=tensors[0].nbytes * (5 if backward else 2),
        targets={"eager": 7.0, "torch.compile": 2.0},
        iterations=3,
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_cuda_quantize(race, backward):
    seed = torch.tensor(1, device="cuda")
    compiled = torch.compile(quantize)
    make = lambda tensors: make_step(tensors, CHANNELS)  # noqa: E731
    ours = lambda x, c: df.gumbel_quantize(x, c, 1.0, seed)  # noqa: E731
    check_cuda(make, ours, lambda x, c: df.reference.gumbel_quantize(x, c, 1.0, seed), backward)
    tensors = random_tensors(backward, BATCH_CUDA, "cuda")
    step = make(tensors)
    race(
        f"gumbel_quantize {'f+b' if backward else 'f'}, batch {BATCH_CUDA}",
        lambda: step(ours),
        {
            "eager": lambda: step(lambda x, c: quantize(x, c, 1.0)),
            "torch.compile": lambda: step(lambda x, c: compiled(x, c, 1.0)),
        },
        expected=None,
        bytes=tensors[0].nbytes * (3 if backward else 1),
        targets={"eager": 7.0, "torch.compile": 2.0},
        iterations=3,
    )
