"""AdamW with 16-bit moments against torch's fused AdamW, whose moments are float32: one large parameter in place."""

from __future__ import annotations

import torch

import dalle_fast as df
from dalle_fast import reference

N = 16 * 2**20
ADAMW = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.96, "eps": 1e-8, "weight_decay": 0.01}


def test_adamw16(race):
    generator = torch.Generator().manual_seed(0)
    param, grad = torch.randn(N, generator=generator), torch.randn(N, generator=generator)
    mean, variance = torch.zeros(N, dtype=torch.int16), torch.zeros(N, dtype=torch.int16)

    part = slice(100_000)
    theirs = [[tensor[part].clone()] for tensor in (param, grad, mean, variance)]
    mine = [[tensor.clone()] for [tensor] in theirs]
    for step in (1, 2):
        reference.adamw16(*theirs, step, **ADAMW)
        df.adamw16(*mine, step, **ADAMW)
    torch.testing.assert_close(mine[0][0], theirs[0][0], rtol=1e-6, atol=1e-7)

    twin = param.clone().requires_grad_()
    twin.grad = grad
    betas = ADAMW["beta1"], ADAMW["beta2"]
    fused = torch.optim.AdamW([twin], lr=ADAMW["lr"], betas=betas, weight_decay=ADAMW["weight_decay"], fused=True)
    race(
        "AdamW, 16M parameters",
        lambda: df.adamw16([param], [grad], [mean], [variance], 3, **ADAMW),
        peers={"torch.optim.AdamW fused": fused.step},
        expected=None,
        bytes=N * 20,
        targets={"torch.optim.AdamW fused": 1.25},
        rounds=20,
    )
