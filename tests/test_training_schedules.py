"""Schedules at points that the paper names, and the plateau that halves."""

import math
from dataclasses import asdict

import pytest

from dalle_fast.training import TrainCLIP, TrainDALLE, TrainDVAE
from dalle_fast.training.schedules import Plateau, cosine, warmup


def test_cosine_passes_through_its_ends_and_its_middle():
    assert cosine(0, 1.0, 0.25, 100) == 1.0
    assert cosine(50, 1.0, 0.25, 100) == pytest.approx(0.625)
    assert cosine(25, 1.0, 0.0, 100) == pytest.approx(0.5 + math.sqrt(0.5) / 2)
    assert cosine(100, 1.0, 0.25, 100) == cosine(10_000, 1.0, 0.25, 100) == 0.25
    assert cosine(0, 1.0, 0.25, 0) == 0.25


def test_warmup_is_linear_and_never_zero():
    assert [warmup(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup(0, 0) == 1.0


def test_dvae_schedules_of_the_paper():
    paper = TrainDVAE()
    assert [paper.tau_at(s) for s in (0, 150_000, 3_000_000)] == [1.0, 1 / 16, 1 / 16]
    assert [paper.beta_at(s) for s in (0, 5_000, 3_000_000)] == [0.0, 6.6, 6.6]
    assert [paper.lr_at(s) for s in (0, 1_200_000, 3_000_000)] == [1e-4, 1.25e-6, 1.25e-6]
    assert paper.tau_at(75_000) == pytest.approx((1 + 1 / 16) / 2)
    assert TrainDVAE(encoder_lr=0.2).lr_shares() == {"encoder": 0.2}


def test_dalle_schedule_of_the_paper():
    paper = TrainDALLE()
    assert paper.lr_at(0) == pytest.approx(4.5e-4 / 5_000)
    assert paper.lr_at(2_499) == pytest.approx(4.5e-4 / 2)
    assert paper.lr_at(4_999) == paper.lr_at(429_999) == 4.5e-4
    assert paper.plateau() is not None
    short = TrainDALLE(lr_schedule="cosine", steps=100, warmup_steps=0)
    assert short.plateau() is None
    assert short.lr_at(50) == pytest.approx(4.5e-4 / 2)
    assert TrainCLIP(steps=100, warmup_steps=10).lr_at(4) < TrainCLIP(steps=100, warmup_steps=0).lr_at(4)


def test_a_plateau_halves_five_times_at_most():
    plateau = Plateau(window=2, patience=3)
    falling = [plateau.update(loss) for loss in (9.0, 9.0, 8.0, 8.0, 7.0, 7.0)]
    assert not any(falling)
    assert plateau.scale == 1.0
    halvings = [step for step in range(60) if plateau.update(7.0)]
    assert halvings == [5, 11, 17, 23, 29]  # 3 windows of 2 steps each
    assert plateau.scale == 0.5**5


def test_a_gain_resets_the_patience_of_a_plateau():
    plateau = Plateau(window=1, patience=2)
    assert [plateau.update(loss) for loss in (5.0, 5.0, 4.0, 4.0, 4.0)] == [False, False, False, False, True]
    worse = Plateau(window=1, patience=1)
    assert [worse.update(loss) for loss in (-1.0, -1.0005, -1.1)] == [False, True, False]  # losses below 0, too


def test_a_plateau_goes_on_from_its_fields():
    losses = [3.0, 2.0, 2.1, 2.0, 1.9999, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    whole, first = Plateau(window=2, patience=2), Plateau(window=2, patience=2)
    for loss in losses:
        whole.update(loss)
    for loss in losses[:5]:
        first.update(loss)
    second = Plateau(**asdict(first))
    for loss in losses[5:]:
        second.update(loss)
    assert second == whole


@pytest.mark.parametrize(
    "field",
    [{"steps": 0}, {"batch_size": 0}, {"lr": -1.0}, {"lr": math.nan}, {"ema_decay": 1.0}, {"caption_dropout": 2.0}],
)
def test_impossible_settings_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        TrainDALLE(**field)
