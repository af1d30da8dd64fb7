"""The random numbers: known answers of Philox4x32-10, and the same bits from the kernels and the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_fast.ops  # noqa: F401  registers the kernels
from dalle_fast import reference


def test_known_answer():
    """The zero key and counter, from the algorithm's authors."""
    words = reference.philox(0, torch.arange(4)).tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def python_philox(seed: int, block: int) -> list[int]:
    """Philox4x32-10 in Python's unbounded integers."""
    word = 0xFFFFFFFF
    counter, key = [block & word, block >> 32, 0, 0], [seed & word, (seed >> 32) & word]
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [(b >> 32) ^ counter[1] ^ key[0], b & word, (a >> 32) ^ counter[3] ^ key[1], a & word]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return counter


@pytest.mark.parametrize(("seed", "block"), [(0, 0), (-1, 2**61 - 1), (0x0123456789ABCDEF, 2**32 + 5)])
def test_wide_seeds_and_counters(seed, block):
    assert reference.philox(seed, torch.arange(4) + 4 * block).tolist() == python_philox(seed, block)


def test_uniform_ends_stay_inside():
    words = torch.tensor([0, 2**32 - 1])
    ends = ((words >> 9).float() + 0.5) * 2.0**-23
    assert 0 < ends[0] < ends[1] < 1
    assert (-torch.log(-torch.log(ends))).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    first=st.integers(0, 2**40) | st.integers(2**34 - 40, 2**34 + 40),  # the block's low half wraps at 2^34
    n=st.integers(0, 1200),
)
def test_kernel_draws_the_bits_of_the_reference(device, seed, first, n):
    drawn = torch.ops.dalle_fast.philox_uniform(torch.tensor(seed, device=device), first, n)
    assert torch.equal(drawn, reference.uniform(seed, first + torch.arange(n, device=device)))


def test_uniform_opcheck(device):
    torch.library.opcheck(torch.ops.dalle_fast.philox_uniform.default, (torch.tensor(3, device=device), 5, 33))


def test_uniform_statistics():
    n = 1 << 20
    u = reference.uniform(17, torch.arange(n)).double()
    assert u.min() > 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    counts = torch.histc(u, 64, 0, 1)
    chi2 = ((counts - n / 64) ** 2 / (n / 64)).sum()
    assert 25 < chi2 < 120  # 63 degrees of freedom: both ends are beyond 1e-5
    centred = u - 0.5
    for lag in (1, 2, 3, 4, 1024):
        correlation = (centred[lag:] * centred[:-lag]).mean() * 12
        assert abs(correlation) < 5 / math.sqrt(n)


def test_gumbel_noise_moments():
    noise = reference.gumbel_noise(3, torch.Size([1 << 20])).double()
    assert abs(noise.mean() - 0.5772156649) < 5 * math.sqrt(math.pi**2 / 6 / noise.numel())
    assert abs(noise.var() - math.pi**2 / 6) < 0.02


def test_streams_and_seeds_differ():
    index = torch.arange(256)
    draws = [reference.philox(seed, index, stream) for seed, stream in ((0, 0), (0, 1), (1, 0), (1 << 32, 0))]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert (a == b).sum() <= 1
