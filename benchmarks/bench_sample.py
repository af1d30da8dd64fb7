"""Draws of 32 candidates from 8192 codes, against the usual torch code: mask, softmax, multinomial."""

from __future__ import annotations

import pytest
import torch

import dalle_fast as df

OPTIONS = {"plain": {}, "top-k 256": {"top_k": 256}, "top-p 0.95": {"top_p": 0.95}}


def with_topk_and_sort(logits, top_k=None, top_p=None):
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        dropped = probabilities.cumsum(-1) - probabilities >= top_p
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sample(race, name, dtype):
    logits = 2 * torch.randn(32, 8192, generator=torch.Generator().manual_seed(0))
    logits = logits.to(dtype)
    options = OPTIONS[name]
    race(
        f"sample {name} {str(dtype).removeprefix('torch.')}",
        lambda: df.sample(logits, 1, **options),
        {"topk/sort + multinomial": lambda: with_topk_and_sort(logits.float(), **options)},
        expected=lambda: df.reference.sample(logits, 1, **options),
        bytes=logits.nbytes,
        targets={"topk/sort + multinomial": 5.0},
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_cuda_sample(race, name):
    logits = 2 * torch.randn(512, 8192, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    options = OPTIONS[name]
    seed = torch.tensor(1, device="cuda")
    race(
        f"sample {name}, 512 rows",
        lambda: df.sample(logits, seed, **options),
        {"topk/sort + multinomial": lambda: with_topk_and_sort(logits, **options)},
        expected=lambda: df.reference.sample(logits, seed, **options),
        bytes=logits.nbytes,
        targets={"topk/sort + multinomial": 5.0},
        iterations=20,
    )
