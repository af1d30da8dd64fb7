"""Resblocks in float16, each with a gradient scale, and the change of the scales from step to step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dalle_fast as df
from dalle_fast import reference


def resblocks(x, weights, norms, scale, nonfinite, spoil=None, cut=None):
    """A stream through float16 resblocks, as in a model.

    The gradient that leaves resblock ``spoil`` is infinite, that of ``cut`` does not reach the stream.
    """
    n = len(weights)
    total, normed = df.residual_layer_norm(
        x, None, *norms[0], dtype=torch.float16, scale_in=scale[0], nonfinite=nonfinite[0]
    )
    for i, weight in enumerate(weights):
        if i == spoil:
            normed.register_hook(lambda grad: grad + torch.inf)
        branch = (normed.detach() if i == cut else normed) @ weight.half()
        leave = {"dtype": torch.float16, "scale_in": scale[i + 1], "nonfinite": nonfinite[i + 1]} if i + 1 < n else {}
        total, normed = df.residual_layer_norm(total, branch, *norms[i + 1], scale_out=scale[i], **leave)
    return normed


def resblock_gradients(device, **faults):
    """Gradients of the stream and of all parameters, without their scales; exact ones; and ``nonfinite``."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*size):
        return torch.randn(size, generator=generator).to(device).requires_grad_()

    n, width = 4, 40
    x, weights = leaf(3, 7, width), [leaf(width, width) for _ in range(n)]
    norms = [(leaf(width), leaf(width)) for _ in range(n + 1)]
    scale, _, nonfinite = df.initial_scales(n, device=device)
    scale *= torch.tensor([1.0, 0.5, 3.0, 0.3], device=device)
    loss = (resblocks(x, weights, norms, scale, nonfinite, **faults) / 300).square().mean()
    vectors = [vector for norm in norms for vector in norm]
    stream, *grads = torch.autograd.grad(loss, [x, *weights, *vectors])
    grads[:n] = [grad / scale[i] for i, grad in enumerate(grads[:n])]

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, *weights, *vectors)]
    total = exact[0]
    for i, weight in enumerate(exact[1 : n + 1]):
        total = total + torch.layer_norm(total, (width,), *exact[n + 1 + 2 * i : n + 3 + 2 * i]) @ weight
    loss = (torch.layer_norm(total, (width,), *exact[-2:]) / 300).square().mean()
    return [stream, *grads], torch.autograd.grad(loss, exact), nonfinite.tolist()


def test_resblocks(device):
    """Gradients far below the range of float16 survive it, as each resblock has its own scale."""
    grads, exact, nonfinite = resblock_gradients(device)
    assert nonfinite == [0, 0, 0, 0]
    for grad, wanted in zip(grads, exact, strict=True):
        assert (grad.double() - wanted).norm() / wanted.norm() < 1e-2


def test_infinite_gradient_stays_in_its_resblock(device):
    spoiled, _, nonfinite = resblock_gradients(device, spoil=2)
    assert nonfinite == [0, 0, 1, 0]
    cut, _, _ = resblock_gradients(device, cut=2)
    assert all(torch.equal(grad, wanted) for grad, wanted in zip(spoiled, cut, strict=True))


def simulate_scales(trace, scale, replicas):
    """Appendix D for one resblock, step by step. Yields its scale after each step, and whether it was divided."""
    smallest, largest = np.float32(replicas * 2**7), np.float32(replicas * 2**24)
    last_division = -(10**9)
    for step, nonfinite in enumerate(trace):
        divide = bool(nonfinite) and step - last_division >= 125
        if divide:
            scale = scale / np.float32(np.sqrt(2))
            last_division = step
        elif not nonfinite:
            scale = scale * np.float32(2 ** (1 / 1000))
        scale = min(max(scale, smallest), largest)
        yield scale, divide


@pytest.mark.parametrize("module", [df, reference], ids=["df", "reference"])
@pytest.mark.parametrize("replicas", [1, 3])
def test_update_scales(module, replicas, device):
    """A thousand steps of many resblocks, from never to always infinite, from one limit to the other."""
    steps, n = 1000, 128
    generator = np.random.default_rng(0)
    chance = np.concatenate([[0, 1], generator.uniform(size=n - 2) ** 4])
    traces = generator.uniform(size=(steps, n)) < chance
    scale, since_division, nonfinite = df.initial_scales(n, replicas, device)
    scale[::2] *= torch.logspace(-6, 10.9, n // 2, base=2).to(device)  # 2^13 at first
    simulated = [list(simulate_scales(traces[:, i], np.float32(scale[i].item()), replicas)) for i in range(n)]
    divisions, reached = 0, set()
    for step in range(steps):
        nonfinite.copy_(torch.from_numpy(traces[step]))
        module.update_scales(scale, since_division, nonfinite, replicas)
        assert scale.tolist() == [float(resblock[step][0]) for resblock in simulated]
        divided = [resblock[step][1] for resblock in simulated]
        assert (since_division == 0).tolist() == divided
        divisions += sum(divided)
        reached |= {scale.min().item(), scale.max().item()}
        assert not nonfinite.any()
    assert divisions > n
    assert {replicas * 2.0**7, replicas * 2.0**24} <= reached


def test_initial_scales(device):
    scale, since_division, nonfinite = df.initial_scales(3, replicas=4, device=device)
    assert scale.tolist() == [4 * 2.0**13] * 3
    assert nonfinite.tolist() == [0] * 3
    df.update_scales(scale, since_division, nonfinite + 1, replicas=4)
    assert scale.tolist() == pytest.approx([4 * 2.0**12.5] * 3)  # the first division need not wait


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scale": torch.ones(2, 2)}, ValueError, r"scale: expected \[n\], got \[2, 2\]"),
        ({"scale": torch.ones(4).double()}, TypeError, "scale: expected torch.float32, got torch.float64"),
        (
            {"since_division": torch.ones(4)},
            TypeError,
            "since_division: expected torch.int32, got torch.float32",
        ),
        ({"nonfinite": torch.ones(3).int()}, ValueError, r"nonfinite: expected \[4\], got \[3\]"),
        ({"scale": torch.ones(8)[::2]}, ValueError, r"scale: expected contiguous memory, got strides \(2,\)"),
        (
            {"nonfinite": torch.ones(4, dtype=torch.int32, device="meta")},
            ValueError,
            "nonfinite: expected a tensor on cpu, got one on meta",
        ),
        ({"replicas": 0}, ValueError, "replicas: expected at least 1, got 0"),
    ],
)
def test_bad_state(change, error, message):
    names = ("scale", "since_division", "nonfinite")
    with pytest.raises(error, match=message):
        df.update_scales(**{**dict(zip(names, df.initial_scales(4), strict=True)), **change})
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        df.initial_scales(0)
