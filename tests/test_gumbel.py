"""gumbel_softmax and gumbel_quantize against their definition, and the properties that it promises."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.op_checks import (
    HALVES,
    assert_equal,
    is_nan_around,
    normal,
    same_on_any_number_of_threads,
    surrounded,
)
from helpers.tolerances import FORWARD, GRADIENT, HALF, error
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_fast as df
from dalle_fast import reference

# The large one has more than a tile of pixels.
GRIDS = pytest.mark.parametrize("grid", [(9, 13), pytest.param((27, 39), marks=pytest.mark.large)], ids=str)
TAUS = pytest.mark.parametrize("tau", [1.0, 0.7])  # with and without the short cut
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def random_logits(*shape, dtype=torch.float32, layout="contiguous", seed=0, device="cpu"):
    logits = 2 * normal(*shape, seed=seed, dtype=dtype, device=device)
    return logits.contiguous(memory_format=LAYOUTS[layout])


def upstream(*outputs):
    """Fixed gradients of outputs, in their dtypes."""
    return [normal(*x.shape, seed=9 + i, dtype=x.dtype, device=x.device) for i, x in enumerate(outputs)]


def run(module, logits, codebook, tau, seed, hard):
    """Outputs and gradients of gumbel_quantize, for fixed upstream gradients."""
    logits, codebook = logits.detach().requires_grad_(), codebook.detach().requires_grad_()
    z, kl, codes = module.gumbel_quantize(logits, codebook, tau, seed, hard)
    return z, kl, codes, *torch.autograd.grad([z, kl], [logits, codebook], upstream(z, kl))


def run_softmax(module, logits, tau, seed, hard):
    """Outputs and gradient of gumbel_softmax, for fixed upstream gradients."""
    logits = logits.detach().requires_grad_()
    y, kl = module.gumbel_softmax(logits, tau, seed, hard)
    return y, kl, *torch.autograd.grad([y, kl], logits, upstream(y, kl))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tau", [1.0, 1 / 16])
@GRIDS
def test_quantize_matches_the_reference(tau, layout, hard, grid, device):
    logits = random_logits(2, 70, *grid, layout=layout, device=device)
    codebook = random_logits(70, 21, 1, 1, seed=1, device=device).flatten(1)
    z, kl, codes, *grads = run(df, logits, codebook, tau, 123456789123, hard)
    z64, kl64, codes64, *grads64 = run(reference, logits.double(), codebook.double(), tau, 123456789123, hard)
    assert error(z, z64) <= FORWARD
    assert error(kl, kl64) <= FORWARD
    assert torch.equal(codes, codes64)
    assert z.is_contiguous(memory_format=LAYOUTS[layout])
    for grad, grad64 in zip(grads, grads64, strict=True):
        assert error(grad, grad64) <= GRADIENT


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tau", [1.0, 1 / 16])
@GRIDS
def test_softmax_matches_the_reference(tau, layout, hard, grid, device):
    logits = random_logits(2, 70, *grid, layout=layout, device=device)
    y, kl, grad = run_softmax(df, logits, tau, 123456789123, hard)
    y64, kl64, grad64 = run_softmax(reference, logits.double(), tau, 123456789123, hard)
    assert error(y, y64) <= FORWARD
    assert error(kl, kl64) <= FORWARD
    assert error(grad, grad64) <= GRADIENT


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_codebook(dtype, hard, device):
    logits = random_logits(1, 70, 5, 13, dtype=dtype, device=device)
    codebook = random_logits(70, 300, 1, 1, dtype=dtype, seed=1, device=device).flatten(1)
    ours = run(df, logits, codebook, 0.7, 11, hard)
    for a, b in zip(ours, run(reference, logits.double(), codebook.double(), 0.7, 11, hard), strict=True):
        assert error(a, b) <= GRADIENT


@pytest.mark.parametrize("layout", LAYOUTS)
@TAUS
def test_more_codes_than_fit_in_shared_memory(tau, layout, device):
    logits = random_logits(1, 9001, 2, 3, layout=layout, device=device)
    y, kl, grad = run_softmax(df, logits, tau, 5, False)
    y64, kl64, grad64 = run_softmax(reference, logits.double(), tau, 5, False)
    assert error(y, y64) <= FORWARD
    assert error(kl, kl64) <= FORWARD
    assert error(grad, grad64) <= GRADIENT


@pytest.mark.parametrize("slope", [60.0, -60.0])
@TAUS
def test_logits_that_rise_or_fall_with_the_code(tau, slope, device):
    """The largest logit so far, which is subtracted before exponentials, has to follow the logits."""
    ramp = torch.linspace(0, 1, 2500, device=device).view(-1, 1, 1)
    logits = random_logits(1, 2500, 2, 3, device=device) + slope * ramp
    codebook = random_logits(2500, 3, 1, 1, seed=1, device=device).flatten(1)
    ours = [*run(df, logits, codebook, tau, 5, False), *run_softmax(df, logits, tau, 5, False)]
    logits, codebook = logits.double(), codebook.double()
    exact = [*run(reference, logits, codebook, tau, 5, False), *run_softmax(reference, logits, tau, 5, False)]
    assert torch.equal(ours[2], exact[2])
    for result, wanted in zip(ours, exact, strict=True):
        assert error(result, wanted) <= FORWARD


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [21, 300])
@pytest.mark.parametrize(("dtype", "tau"), [(torch.bfloat16, 0.5), (torch.bfloat16, 1.0), (torch.float16, 1.0)])
@GRIDS
def test_16_bits(dtype, tau, layout, hard, channels, grid, device):
    """As close to float64 as the reference in 16 bits, up to a factor; the KL is computed in float32."""
    logits = random_logits(2, 70, *grid, layout=layout, device=device).to(dtype)
    codebook = random_logits(70, channels, 1, 1, seed=1, device=device).flatten(1).to(dtype)
    ours, in_half = (run(module, logits, codebook, tau, 77, hard) for module in (df, reference))
    exact = run(reference, logits.double(), codebook.double(), tau, 77, hard)
    ours, in_half = ([*a, *run_softmax(m, logits, tau, 77, hard)] for m, a in ((df, ours), (reference, in_half)))
    exact = [*exact, *run_softmax(reference, logits.double(), tau, 77, hard)]
    assert torch.equal(ours[2], exact[2])
    for a, b, e in zip(ours, in_half, exact, strict=True):
        assert a.dtype == b.dtype
        assert error(a, e) <= max(HALF * error(b, e), FORWARD)


@pytest.mark.parametrize("dtype", HALVES)
def test_unlikely_codes_keep_their_gradient(dtype, device):
    """Samples too small for 16 bits still move the codebook."""
    logits = random_logits(1, 70, 5, 13, device=device)
    logits[:, 35:] -= 14.0
    logits, codebook = logits.to(dtype), random_logits(70, 4, 1, 1, seed=1, device=device).flatten(1).to(dtype)
    dz = torch.full((1, 4, 5, 13), 512.0, dtype=dtype, device=device)

    def gradient(module, logits, codebook):
        codebook = codebook.detach().requires_grad_()
        z, _, _ = module.gumbel_quantize(logits, codebook, 1.0, 3)
        return torch.autograd.grad(z, codebook, dz.to(z))[0]

    exact = gradient(reference, logits.double(), codebook.double())
    assert exact[35:].max() < 0.1
    torch.testing.assert_close(
        gradient(df, logits, codebook).double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=0
    )


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    codes=st.integers(1, 140),
    height=st.integers(1, 9),
    width=st.integers(1, 17),
    layout=st.sampled_from(list(LAYOUTS)),
    hard=st.booleans(),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_odd_sizes(device, batch, codes, height, width, layout, hard, seed):
    logits = random_logits(batch, codes, height, width, layout=layout, device=device)
    codebook = random_logits(codes, 3, 1, 1, seed=1, device=device).flatten(1)
    y, kl = df.gumbel_softmax(logits, 0.7, seed, hard)
    y64, kl64 = reference.gumbel_softmax(logits.double(), 0.7, seed, hard)
    torch.testing.assert_close(y.double(), y64, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl.double(), kl64, rtol=1e-5, atol=1e-4)
    assert y.stride() == torch.empty_like(logits).stride()
    _, _, drawn, grad, _ = run(df, logits, codebook, 0.7, seed, hard)
    _, _, drawn64, grad64, _ = run(reference, logits.double(), codebook.double(), 0.7, seed, hard)
    assert torch.equal(drawn, drawn64)
    assert (grad - grad64).abs().max() <= 1e-4 * grad64.abs().max().clamp(min=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout, device):
    logits = random_logits(2, 5, 2, 3, dtype=torch.float64, layout=layout, device=device).requires_grad_()
    codebook = random_logits(5, 4, 1, 1, dtype=torch.float64, device=device).flatten(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: df.gumbel_softmax(x, 0.8, 7), [logits])
    assert torch.autograd.gradcheck(lambda x, c: df.gumbel_quantize(x, c, 0.8, 7)[:2], [logits, codebook])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hard", [False, True])
def test_opcheck(layout, hard, device):
    logits, seed = random_logits(2, 70, 3, 5, layout=layout, device=device), torch.tensor(3, device=device)
    op = torch.ops.dalle_fast.gumbel_softmax.default
    torch.library.opcheck(op, (logits.clone().requires_grad_(), 0.7, seed, hard))
    y, kl, _, stats = op(logits, 0.7, seed, hard)
    backward = torch.ops.dalle_fast.gumbel_softmax_backward.default
    torch.library.opcheck(backward, (torch.ones_like(y), torch.ones_like(kl), logits, stats, 0.7, seed))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_opcheck_quantize(dtype, layout, hard, device):
    logits = random_logits(2, 70, 3, 5, layout=layout, device=device).to(dtype)
    codebook = torch.randn(70, 4).to(device, dtype)
    seed = torch.tensor(3, device=device)
    op = torch.ops.dalle_fast.gumbel_quantize.default
    torch.library.opcheck(op, (logits.clone().requires_grad_(), codebook.clone().requires_grad_(), 0.7, seed, hard))
    z, kl, *saved = op(logits, codebook, 0.7, seed, hard)
    backward = torch.ops.dalle_fast.gumbel_quantize_backward.default
    torch.library.opcheck(
        backward, (torch.ones_like(z), torch.ones_like(kl), logits, codebook, *saved, 0.7, seed, hard)
    )


def test_straight_through(device):
    """Hard samples are exact one-hots of the codes, with the soft sample's gradient."""
    logits = random_logits(2, 130, 4, 5, device=device)
    codebook = torch.eye(130, device=device)
    y, _ = df.gumbel_softmax(logits, 0.5, 11, hard=True)
    assert set(y.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(y.sum(1), torch.ones(2, 4, 5, device=device))
    z, _, codes = df.gumbel_quantize(logits, codebook, 0.5, 11, hard=True)
    assert torch.equal(y.argmax(1), codes)
    assert torch.equal(z.argmax(1), codes)
    soft, hard = (run(df, logits, codebook, 0.5, 11, flag)[3] for flag in (False, True))
    assert torch.equal(soft, hard)


@pytest.mark.large
def test_codes_follow_the_softmax(device):
    """The argmax of the noisy logits is a draw from softmax(logits), at any temperature."""
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1], device=device)
    logits = probabilities.log().view(1, 4, 1, 1).expand(1, 4, 256, 256)
    _, _, codes = df.gumbel_quantize(logits, torch.eye(4, device=device), 0.3, 2024)
    frequencies = codes.flatten().bincount(minlength=4) / codes.numel()
    sigma = (probabilities * (1 - probabilities) / codes.numel()).sqrt()
    assert ((frequencies - probabilities).abs() < 5 * sigma).all()


def test_low_temperature_is_one_hot(device):
    logits = random_logits(1, 40, 4, 4, device=device)
    y, _ = df.gumbel_softmax(logits, 1e-4, 5)
    torch.testing.assert_close(y.amax(1), torch.ones(1, 4, 4, device=device), rtol=0, atol=1e-3)


def test_kl_of_known_distributions(device):
    uniform = torch.full((2, 8192, 2, 2), 3.25, device=device)
    assert torch.equal(df.gumbel_softmax(uniform, 1.0, 0)[1], torch.zeros(2, device=device))
    one_hot = torch.zeros(1, 8192, 2, 2, device=device)
    one_hot[:, 17] = 500.0
    kl = df.gumbel_softmax(one_hot, 1.0, 0)[1]
    assert kl.item() == pytest.approx(4 * math.log(8192), rel=1e-6)


def test_kl_is_per_image(device):
    logits = random_logits(8, 64, 4, 4, device=device)
    kl = df.gumbel_softmax(logits, 1.0, 0)[1]
    for image in range(8):
        assert torch.equal(df.gumbel_softmax(logits[image : image + 1], 1.0, 0)[1], kl[image : image + 1])


def test_strided_and_surrounded_by_nan(device):
    """Only the elements of the view are read, whatever its strides and neighbours."""
    codebook = random_logits(70, 3, 1, 1, seed=1, device=device).flatten(1)
    plain = random_logits(2, 70, 5, 7, device=device)
    expected = (*run(df, plain, codebook, 0.7, 1, False), *run_softmax(df, plain, 0.7, 1, False))
    for order in ((0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0)):
        view = surrounded(plain, order=order)
        assert_equal((*run(df, view, codebook, 0.7, 1, False), *run_softmax(df, view, 0.7, 1, False)), expected)
        assert is_nan_around(view)


def test_layouts_agree(device):
    """The noise belongs to the logical element: the layout changes nothing but rounding."""
    logits, codebook = random_logits(2, 70, 5, 7, device=device), torch.eye(70, device=device)
    contiguous = run(df, logits, codebook, 0.7, 1, False)
    last = run(df, logits.contiguous(memory_format=torch.channels_last), codebook, 0.7, 1, False)
    for a, b in zip(contiguous, last, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradient_of_an_expanded_sum(device):
    logits = random_logits(2, 70, 5, 7, device=device).requires_grad_()
    y, kl = df.gumbel_softmax(logits, 0.7, 1)
    (grad,) = torch.autograd.grad(y.sum() + 0 * kl.sum(), logits)
    assert grad.abs().max() < 1e-5  # each sample sums to 1, whatever the logits


def test_same_bits_on_any_number_of_threads(device):
    logits = random_logits(2, 300, 12, 12, device=device)
    codebook = random_logits(300, 5, 1, 1, device=device).flatten(1)
    same_on_any_number_of_threads(
        lambda: (*run_softmax(df, logits, 0.7, 5, False), *run(df, logits, codebook, 0.7, 5, False))
    )


def test_seed_as_int_or_tensor(device):
    logits = random_logits(1, 10, 2, 2, device=device)
    y = df.gumbel_softmax(logits, 1.0, -5)[0]
    assert torch.equal(y, df.gumbel_softmax(logits, 1.0, torch.tensor([-5]))[0])
    assert not torch.equal(y, df.gumbel_softmax(logits, 1.0, -6)[0])


@TAUS
def test_impossible_codes_get_nothing(tau, device):
    logits = random_logits(1, 200, 2, 2, device=device)
    logits[:, :100] = float("-inf")
    y, _ = df.gumbel_softmax(logits, tau, 3)
    assert torch.equal(y[:, :100], torch.zeros(1, 100, 2, 2, device=device))
    torch.testing.assert_close(y.sum(1), torch.ones(1, 2, 2, device=device))


@TAUS
def test_nan_logits_stay_visible(tau, device):
    logits = random_logits(1, 200, 2, 2, device=device)
    logits[0, 150, 1, 1] = float("nan")
    y, kl = df.gumbel_softmax(logits, tau, 3)
    assert y[0, :, 1, 1].isnan().all()
    assert y[0, :, 0, 0].isfinite().all()
    assert kl.isnan().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tau": 0.0}, ValueError, "tau: expected a finite positive number, got 0.0"),
        ({"tau": -1.0}, ValueError, "tau: .* got -1.0"),
        ({"tau": float("nan")}, ValueError, "tau: .* got nan"),
        ({"tau": float("inf")}, ValueError, "tau: .* got inf"),
        ({"logits": torch.zeros(2, 3)}, ValueError, r"logits: expected \[B, K, h, w\], got \[2, 3\]"),
        ({"logits": torch.zeros(0, 3, 2, 2)}, ValueError, r"logits: expected a non-empty .* got \[0, 3, 2, 2\]"),
        (
            {"logits": torch.zeros(1, 3, 2, 2, dtype=torch.int32)},
            TypeError,
            "logits: .*float16, got torch.int32",
        ),
        ({"seed": 2**63}, ValueError, "seed: expected 64 bits with a sign, got 9223372036854775808"),
        ({"seed": 1.5}, TypeError, "seed: expected an int or an int64 tensor, got float"),
        ({"seed": torch.tensor(1.0)}, TypeError, "seed: expected an int64 tensor of one element, got torch.float32"),
        ({"seed": torch.tensor([1, 2])}, TypeError, "seed: expected an int64 tensor of one element"),
        ({"codebook": torch.zeros(4, 2)}, ValueError, r"codebook: expected \[3, C\], got \[4, 2\]"),
        ({"codebook": torch.zeros(3, 0)}, ValueError, r"codebook: expected a non-empty \[3, C\], got \[3, 0\]"),
        ({"codebook": torch.zeros(3)}, ValueError, r"codebook: expected \[3, C\], got \[3\]"),
        ({"codebook": torch.zeros(3, 2).double()}, TypeError, "codebook: expected torch.float32, got torch.float64"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"logits": torch.zeros(1, 3, 2, 2), "codebook": torch.zeros(3, 2), "tau": 1.0, "seed": 0, **change}
    with pytest.raises(error, match=message):
        df.gumbel_quantize(**arguments)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("tau", [1.0, 0.7])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pixel_without_a_softmax_is_nan(bad, tau, hard, dtype, layout, device):
    """NaN, an infinite logit, no finite logit: NaN as in the reference, the other pixels as they were."""
    logits = random_logits(2, 140, 3, 5, layout=layout, device=device).to(dtype)
    logits[0, 139, 1, 2] = bad
    logits[1, 0, 2, 4] = bad
    logits[1, :, 0, 0] = -torch.inf
    logits[1, 3:, 0, 1] = -torch.inf  # has one
    codebook = random_logits(140, 5, 1, 1, seed=1, device=device).flatten(1).to(dtype)
    y, _ = df.gumbel_softmax(logits, tau, 5, hard)
    z, _, _ = df.gumbel_quantize(logits, codebook, tau, 5, hard)
    y_right, _ = reference.gumbel_softmax(logits, tau, 5, hard)
    z_right, _, _ = reference.gumbel_quantize(logits, codebook, tau, 5, hard)
    for ours, wanted in ((y, y_right), (z, z_right)):
        assert torch.equal(ours.isnan(), wanted.isnan())
        assert ours.isnan().any(1).sum() == 3
        torch.testing.assert_close(ours, wanted, equal_nan=True, rtol=2e-2, atol=2e-2)
