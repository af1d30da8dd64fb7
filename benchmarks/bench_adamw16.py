"""AdamW with 16-bit moments against torch's fused AdamW, whose moments are float32, in place.

On a CPU, one large parameter; on a GPU, as many as a model has, with the norm of their gradients clipped.
"""

from __future__ import annotations

import torch

import dalle_fast as df
from dalle_fast import reference

N = 16 * 2**20
TENSORS_CUDA, LIMIT = 64, 4.0
ADAMW = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.96, "eps": 1e-8, "weight_decay": 0.01}


def make_tensors(tensors, n, device):
    """Parameters, gradients, and moments of zero."""
    generator = torch.Generator(device).manual_seed(0)
    params, grads = ([torch.randn(n, generator=generator, device=device) for _ in range(tensors)] for _ in range(2))
    means, variances = ([torch.zeros(n, dtype=torch.int16, device=device) for _ in params] for _ in range(2))
    return params, grads, means, variances


def check(tensors):
    """Two steps of the first elements of each tensor."""
    theirs, mine = ([[x[:100_000].clone() for x in group] for group in tensors] for _ in range(2))
    for step in (1, 2):
        reference.adamw16(*theirs, step, **ADAMW)
        df.adamw16(*mine, step, **ADAMW)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-7)


def make_peer(params, grads, **options):
    """Copies of the parameters, and torch's optimizer for them."""
    twins = [param.clone().requires_grad_() for param in params]
    for twin, grad in zip(twins, grads, strict=True):
        twin.grad = grad.clone()
    betas = ADAMW["beta1"], ADAMW["beta2"]
    decay = ADAMW["weight_decay"]
    return twins, torch.optim.AdamW(twins, lr=ADAMW["lr"], betas=betas, weight_decay=decay, fused=True, **options)


def test_adamw16(race):
    tensors = make_tensors(1, N, "cpu")
    check(tensors)
    _, fused = make_peer(*tensors[:2])
    race(
        "AdamW, 16M parameters",
        lambda: df.adamw16(*tensors, 3, **ADAMW),
        peers={"torch.optim.AdamW fused": fused.step},
        expected=None,
        bytes=N * 20,
        targets={"torch.optim.AdamW fused": 1.25},
        rounds=20,
    )


def test_cuda_adamw16(race):
    tensors = make_tensors(TENSORS_CUDA, N, "cuda")
    check(tensors)
    twins, fused = make_peer(*tensors[:2], capturable=True)
    step = torch.ones((), dtype=torch.int64, device="cuda")
    lr, decay = (
        torch.full((), ADAMW["lr"], device="cuda"),
        torch.full((TENSORS_CUDA,), ADAMW["weight_decay"], device="cuda"),
    )
    options = {**ADAMW, "lr": lr, "weight_decay": decay}

    def ours():
        norm, skip = df.gradient_norm(tensors[1])
        df.adamw16(*tensors, step, **options, clip=(LIMIT / norm).clamp(max=1), skip=skip)

    def theirs():
        torch.nn.utils.clip_grad_norm_(twins, LIMIT)
        fused.step()

    race(
        f"clip + AdamW, {TENSORS_CUDA} x 16M parameters",
        ours,
        peers={"clip + torch.optim.AdamW fused": theirs},
        expected=None,
        bytes=TENSORS_CUDA * N * 24,
        targets={"clip + torch.optim.AdamW fused": 1.8},
    )
