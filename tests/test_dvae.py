"""Stage 1: shapes and names of the release, the likelihood, the bound."""

import math
from dataclasses import replace

import pytest
import torch

from dalle_fast.config import PRESETS, DVAEConfig
from dalle_fast.models import DiscreteVAE
from dalle_fast.models.codebook_init import init_codes
from dalle_fast.models.dvae import logit_laplace_nll, map_pixels, unmap_pixels
from dalle_fast.training.dvae import with_grain

SMALL = DVAEConfig(image_size=16, vocab_size=12, n_hid=8, n_init=6, groups=(1, 2), n_blk_per_group=1)


def images(b: int = 2, size: int = 16) -> torch.Tensor:
    return torch.rand(b, 3, size, size, generator=torch.Generator().manual_seed(0))


def small_model() -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(SMALL)


def test_default_sizes_are_those_of_the_release():
    with torch.device("meta"):
        model = DiscreteVAE(DVAEConfig())
    assert sum(p.numel() for p in model.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in model.decoder.parameters()) == 43_829_766
    assert model.cfg.grid == 32


def test_parameter_names_are_those_of_the_release():
    with torch.device("meta"):
        model = DiscreteVAE(DVAEConfig())
    names = dict(model.encoder.named_parameters())
    assert names["blocks.input.w"].shape == (256, 3, 7, 7)
    assert names["blocks.group_1.block_1.res_path.conv_1.w"].shape == (64, 256, 3, 3)
    assert names["blocks.group_2.block_1.id_path.w"].shape == (512, 256, 1, 1)
    assert names["blocks.group_4.block_2.res_path.conv_4.w"].shape == (2048, 512, 1, 1)
    assert names["blocks.output.conv.b"].shape == (8192,)
    assert "blocks.group_1.block_1.id_path.w" not in names
    names = dict(model.decoder.named_parameters())
    assert names["blocks.input.w"].shape == (128, 8192, 1, 1)
    assert names["blocks.group_1.block_1.res_path.conv_1.w"].shape == (512, 128, 1, 1)
    assert names["blocks.group_4.block_2.res_path.conv_4.w"].shape == (256, 64, 3, 3)
    assert names["blocks.output.conv.w"].shape == (6, 256, 1, 1)


def test_branches_are_damped_by_the_number_of_layers_squared():
    assert DVAEConfig().branch_gain == 1 / 64
    assert PRESETS["tiny"].dvae.branch_gain == 1.0


def test_shapes_and_ranges():
    model = small_model()
    codes = model.encode(images())
    assert codes.shape == (2, 8, 8) and codes.dtype == torch.int64
    copies = model.decode(codes)
    assert copies.shape == (2, 3, 16, 16) and 0 <= copies.min() <= copies.max() <= 1


def test_pixel_map_is_inverted_and_keeps_away_from_the_ends():
    x = torch.linspace(0, 1, 11)
    assert map_pixels(x)[0] == pytest.approx(0.1) and map_pixels(x)[-1] == pytest.approx(0.9)
    torch.testing.assert_close(unmap_pixels(map_pixels(x)), x)


@pytest.mark.parametrize("mu,log_b", [(0.0, 0.0), (1.5, -1.0), (-0.7, 0.5)])
def test_likelihood_integrates_to_one(mu, log_b):
    # In t = logit(x) the mass is f(x) x (1 - x) dt, which has no sharp ends to miss.
    t = torch.linspace(-60, 60, 400_001, dtype=torch.float64)
    x = torch.sigmoid(t).clamp(1e-15, 1 - 1e-15)
    density = torch.exp(-logit_laplace_nll(x, torch.tensor(mu).double(), torch.tensor(log_b).double()))
    inside = t.abs() < 30
    mass = torch.trapezoid((density * x * (1 - x))[inside], t[inside])
    assert mass.item() == pytest.approx(1.0, abs=1e-4)


def test_loss_is_the_bound_per_pixel_value():
    model = small_model()
    loss, parts = model.loss(images(), tau=1.0, beta=3.0, seed=5)
    assert loss.item() == pytest.approx(parts["nll"].item() + 3.0 * parts["kl"].item() / (3 * 16 * 16), rel=1e-5)
    assert parts["code_counts"].sum() == 2 * 8 * 8
    assert 0 <= parts["kl"].item() <= 8 * 8 * math.log(12) + 1e-4


def test_kl_of_a_batch_of_8_equals_that_of_a_batch_of_1():
    model = small_model()
    one = images(1)
    assert model.loss(one.repeat(8, 1, 1, 1), 1.0, 1.0, 0)[1]["kl"].item() == pytest.approx(
        model.loss(one, 1.0, 1.0, 0)[1]["kl"].item(), rel=1e-5
    )


def test_same_seed_same_loss():
    model = small_model()
    a, b, c = (model.loss(images(), 0.7, 1.0, seed)[0].item() for seed in (1, 1, 2))
    assert a == b != c


def test_codebook_spreads_over_the_images_when_started_from_them():
    model = small_model()
    batch = images(8)
    before = model.encode(batch).unique().numel()
    init_codes(model, batch)
    assert before < 12 and model.encode(batch).unique().numel() == 12


def test_a_short_training_learns_the_colours_of_plain_images():
    torch.manual_seed(0)
    model = DiscreteVAE(replace(SMALL, n_hid=16, gain=1.0))
    plain = torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(8, 3, 16, 16).contiguous()
    init_codes(model, plain)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(100):
        loss, _ = model.loss(with_grain(plain, 0.1, step), 0.5, 1.0, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mse = (model.decode(model.encode(plain)) - plain).square().mean()
    assert mse < 0.5 * plain.var()


@pytest.mark.parametrize(
    "bad,message",
    [
        (torch.rand(2, 3, 8, 8), r"images: expected float \[B, 3, 16, 16\], got torch.float32 \[2, 3, 8, 8\]"),
        (torch.rand(3, 16, 16), "images: expected float"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "got torch.uint8"),
    ],
)
def test_bad_images(bad, message):
    with pytest.raises(ValueError, match=message):
        small_model().encode(bad)


def test_bad_codes_and_sizes():
    with pytest.raises(ValueError, match=r"codes: expected \[B, h, w\] in \[0, 12\)"):
        small_model().decode(torch.full((1, 8, 8), 12))
    with pytest.raises(ValueError, match="image_size: expected a multiple of 8, got 100"):
        DVAEConfig(image_size=100)
