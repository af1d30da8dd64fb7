"""From logits to a code: the same draws as the definition, which follow the distribution, under every option."""

from __future__ import annotations

import pytest
import torch
from helpers.op_checks import HALVES, normal, same_on_any_number_of_threads, surrounded
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_fast as df
from dalle_fast import reference
from dalle_fast.reference import keep_top_k, keep_top_p

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 3.0, 1.0]])
OPTIONS = {
    "plain": {},
    "top_k": {"top_k": 40},
    "top_p": {"top_p": 0.8},
    "both": {"top_k": 70, "top_p": 0.6, "temperature": 1.5},
    "cold": {"temperature": 0.01, "top_k": 3, "top_p": 0.9999},
    "hot": {"temperature": 50.0, "top_p": 0.3},
}
DTYPES = [torch.float32, *HALVES]
FEW_OR_MANY = pytest.mark.parametrize("rows", [4, pytest.param(400, marks=pytest.mark.large)])


def random_logits(*shape, **options):
    return 2 * normal(*shape, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@FEW_OR_MANY
def test_draws_the_codes_of_the_reference(options, dtype, rows, device):
    for codes in (1, 7, 513, 2000):
        logits = random_logits(rows, codes, seed=codes, dtype=dtype, device=device)
        assert torch.equal(df.sample(logits, 3, **options), reference.sample(logits, 3, **options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@FEW_OR_MANY
def test_ties_and_impossible_codes(options, rows, device):
    """Rows of few distinct values, in which equal logits meet every boundary; zeros of both signs; minus infinity."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, -torch.inf])
    picks = torch.randint(5, (rows, 900), generator=torch.Generator().manual_seed(1))
    logits = values[picks].to(device)
    quarter = rows // 4
    logits[:, 0] = 0.5
    logits[:quarter] = 0.0
    logits[quarter : 2 * quarter, 1:] = -torch.inf
    drawn = df.sample(logits, 8, **options)
    assert torch.equal(drawn, reference.sample(logits, 8, **options))
    assert (drawn[quarter : 2 * quarter] == 0).all()


@settings(max_examples=60)
@given(
    rows=st.integers(1, 5),
    codes=st.integers(1, 1100),
    seed=st.integers(-(2**63), 2**63 - 1),
    temperature=st.floats(1e-3, 1e3),
    top_k=st.none() | st.integers(1, 1200),
    top_p=st.none() | st.floats(1e-6, 1.0),
    first=st.integers(0, 2**40),
    gap=st.integers(0, 9),
)
def test_any_sizes_and_options(device, rows, codes, seed, temperature, top_k, top_p, first, gap):
    logits = random_logits(rows, codes, seed=codes, device=device)
    arguments = (logits, seed, temperature, top_k, top_p, first, codes + gap)
    assert torch.equal(df.sample(*arguments), reference.sample(*arguments))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@FEW_OR_MANY
def test_extreme_logits(scale, rows, device):
    logits = random_logits(rows, 300, device=device) * scale
    for temperature in (1.0, scale):
        drawn = df.sample(logits, 5, temperature, top_p=0.9)
        assert torch.equal(drawn, reference.sample(logits, 5, temperature, top_p=0.9))


def test_top_k_keeps_the_k_largest():
    assert torch.isfinite(keep_top_k(LOGITS, 2)).tolist() == [[True, True, False, False], [False, False, True, True]]
    assert torch.equal(keep_top_k(LOGITS, 9), LOGITS)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    # Probabilities of the first row: 0.644, 0.237, 0.087, 0.032.
    for p, kept in ((0.6, 1), (0.65, 2), (0.88, 2), (0.9, 3), (1.0, 4)):
        assert torch.isfinite(keep_top_p(LOGITS, p))[0].sum() == kept, p
    assert torch.isfinite(keep_top_p(LOGITS, 1e-9)).sum(1).tolist() == [1, 1]
    equal = torch.isfinite(keep_top_p(torch.zeros(1, 10), 0.3))[0]
    assert equal.nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, 4), ({"top_k": 3}, 3), ({"top_p": 0.7}, 2), ({"top_k": 3, "top_p": 0.95}, 3), ({"top_p": 1e-9}, 1)],
)
@pytest.mark.large
def test_draws_follow_the_distribution(options, kept, device):
    drawn = df.sample(LOGITS[:1].to(device).expand(40_000, -1), 0, temperature=0.9, **options).cpu()
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    wanted = (LOGITS[0] / 0.9).masked_fill(torch.arange(4) >= kept, -torch.inf).softmax(0)
    torch.testing.assert_close(share, wanted, atol=0.01, rtol=0)
    assert (share[kept:] == 0).all()


def test_low_temperature_is_the_argmax_and_the_input_stays(device):
    logits = LOGITS.to(device, copy=True)
    assert df.sample(logits, 4, temperature=1e-3).tolist() == [0, 2]
    assert torch.equal(logits.cpu(), LOGITS)


def test_draws_do_not_depend_on_the_number_of_candidates(device):
    logits = random_logits(20, 300, device=device)
    place = {"first": 7 * 300, "pitch": 64 * 300}
    many = df.sample(logits, 1, **place)
    assert torch.equal(df.sample(logits[:3], 1, **place), many[:3])
    assert not torch.equal(df.sample(logits, 1, first=8 * 300, pitch=64 * 300), many)


def test_seed_and_first_as_int_or_tensor(device):
    logits = random_logits(50, 300, device=device)
    drawn = df.sample(logits, -5, first=600)
    assert torch.equal(df.sample(logits, torch.tensor([-5]), first=torch.tensor(600)), drawn)
    assert not torch.equal(df.sample(logits, -6, first=600), drawn)
    assert not torch.equal(df.sample(logits, -5), drawn)


@pytest.mark.parametrize("options", [{}, {"top_k": 5000, "top_p": 0.9}])
def test_more_codes_than_fit_in_shared_memory(options, device):
    logits = random_logits(2, 60_000, device=device).round(decimals=1)  # with ties
    assert torch.equal(df.sample(logits, 7, **options), reference.sample(logits, 7, **options))


def test_same_draws_on_any_number_of_threads():
    logits = random_logits(33, 700)
    same_on_any_number_of_threads(lambda: [df.sample(logits, 2, top_p=0.9)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_surrounded_by_nan(dtype, device):
    logits = random_logits(6, 600, dtype=dtype, device=device)
    for order in ((0, 1), (1, 0)):
        view = surrounded(logits, pad=5, order=order)
        assert torch.equal(df.sample(view, 3, top_k=50, top_p=0.9), df.sample(logits, 3, top_k=50, top_p=0.9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, device):
    logits = random_logits(3, 70, dtype=dtype, device=device)
    seed, first = (torch.tensor(x, device=device) for x in (3, 5))
    torch.library.opcheck(torch.ops.dalle_fast.sample.default, (logits, seed, first, 0.9, 50, 0.9, 80))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("module", [df, reference])
def test_rows_that_cannot_be_drawn_from(bad, module, device):
    logits = random_logits(3, 70, device=device)
    logits[2, 40 if bad != -torch.inf else slice(None)] = bad
    if module is df and device.type == "cuda":  # the host does not wait to find out
        assert (df.sample(logits, 0) < 0).tolist() == [False, False, True]
        return
    with pytest.raises(RuntimeError, match="expected no NaN and a finite largest value in every row, not so in row 2"):
        module.sample(logits, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3)}, ValueError, r"logits: expected \[C, K\], got \[3\]"),
        ({"logits": torch.zeros(0, 3)}, ValueError, r"logits: expected a non-empty \[C, K\], got \[0, 3\]"),
        (
            {"logits": torch.zeros(2, 3).double()},
            TypeError,
            "logits: expected torch.float32 or torch.bfloat16 or torch.float16, got torch.float64",
        ),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0, got 0.0"),
        ({"temperature": torch.nan}, ValueError, "temperature: .* got nan"),
        ({"temperature": torch.inf}, ValueError, "temperature: .* got inf"),
        ({"top_k": 0}, ValueError, "top_k: expected 1 or more, got 0"),
        ({"top_p": 0.0}, ValueError, r"top_p: expected a share in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, ValueError, r"top_p: .* got 1.5"),
        ({"first": -1}, ValueError, "first and pitch: expected 0 or more and 3 or more, got -1 and 3"),
        ({"pitch": 2}, ValueError, "first and pitch: .* got 0 and 2"),
        ({"seed": 2**63}, ValueError, "seed: expected 64 bits with a sign, got 9223372036854775808"),
        ({"first": torch.zeros(2)}, TypeError, "first: expected an int64 tensor of one element, got torch.float32"),
        ({"first": torch.tensor(-1)}, RuntimeError, "first: expected 0 or more, got -1"),
        ({"seed": 1.5}, TypeError, "seed: expected an int or an int64 tensor, got float"),
        ({"seed": torch.tensor(1.0)}, TypeError, "seed: expected an int64 tensor of one element, got torch.float32"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        df.sample(**{"logits": torch.zeros(2, 3), "seed": 0, **change})


@settings(max_examples=200)
@given(
    rows=st.integers(1, 4),
    codes=st.integers(1, 40),
    largest=st.sampled_from([0.0, -0.0, 1.0, -1e-45, 1e-45]),
    dtype=st.sampled_from(DTYPES),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.floats(1e-6, 1.0),
    temperature=st.sampled_from([1e-40, 0.1, 1.0, 7.0]),
    seed=st.integers(0, 2**40),
)
def test_rounded_logits_with_zeros_of_both_signs(rows, codes, largest, dtype, top_k, top_p, temperature, seed, device):
    """Also where the largest is -0.0, or one of both zeros is, or the next float after a zero."""
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(rows, codes, generator=generator)).round().clamp(max=largest)
    signs = torch.randint(2, (rows, codes), generator=generator, dtype=torch.bool)
    logits = torch.where((logits == 0) & signs, -logits, logits).to(device, dtype)
    arguments = (logits, seed, temperature, top_k, top_p)
    assert torch.equal(df.sample(*arguments), reference.sample(*arguments))


def test_the_largest_may_be_a_negative_zero(device):
    for row in ([-0.0, -5.0, -5.0], [-0.0, 0.0, -1.0], [0.0, -0.0], [-0.0]):
        logits = torch.tensor([row], device=device)
        for seed in range(50):
            for top_p in (1e-6, 0.3, 0.5, 0.9, 0.999999):
                arguments = (logits, seed, 1.0, None, top_p)
                assert torch.equal(df.sample(*arguments), reference.sample(*arguments))


def test_the_stream_of_noise_ends_at_63_bits(device):
    logits = random_logits(6, 9, device=device)
    for first, pitch in ((2**63 - 1, None), (0, 2**62), (2**63 - 54, None), (2**62, 2**61), (2**70, None), (0, 2**64)):
        with pytest.raises(ValueError, match="first and pitch: expected first"):
            df.sample(logits, 1, first=first, pitch=pitch)
    for first, pitch in ((2**63 - 55, None), (2**62 - 1, 2**62 // 6), (7, (2**63 - 8) // 6)):
        arguments = (logits, 1, 1.0, None, None, first, pitch)
        assert torch.equal(df.sample(*arguments), reference.sample(*arguments))
    with pytest.raises(RuntimeError, match="first: expected"):
        df.sample(logits.cpu(), 1, first=torch.tensor(2**63 - 54))
