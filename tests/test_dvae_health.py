"""Health of a dVAE trained on real images: the codes in use, and its error against that of k-means patches."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dalle_fast.config import PRESETS
from dalle_fast.data import Pair, open_pairs
from dalle_fast.data.sources.scenes import SceneCorpus
from dalle_fast.demo.run import stack_images
from dalle_fast.models.codebook_init import image_patches, kmeans, nearest
from dalle_fast.training import train_dvae
from dalle_fast.training.dvae import with_grain
from dalle_fast.training.settings import TRAIN_PRESETS


def points(n: int = 500) -> torch.Tensor:
    """Four clouds of points around the corners of a square."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[0.0, 0.0], [0.0, 10.0], [10.0, 0.0], [10.0, 10.0]])
    chosen = corners[torch.arange(n) % 4]
    return chosen + 0.1 * torch.randn(n, 2, generator=generator)


def test_kmeans_finds_the_middle_of_each_cloud():
    centroids = kmeans(points(), 4)
    order = nearest(torch.tensor([[0.0, 0.0], [0.0, 10.0], [10.0, 0.0], [10.0, 10.0]]), centroids)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    means = torch.stack([points()[i::4].mean(0) for i in range(4)])
    torch.testing.assert_close(centroids[order], means, rtol=0, atol=1e-4)


def test_kmeans_of_fewer_points_than_centroids():
    few = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    centroids = kmeans(few, 5)
    assert centroids.shape == (5, 2)
    torch.testing.assert_close(centroids[nearest(few, centroids)], few)


def test_kmeans_refuses_nothing():
    with pytest.raises(ValueError, match=r"kmeans: expected points \[n, D\] and k of 1 or more, got \[0, 3\] and 2"):
        kmeans(torch.zeros(0, 3), 2)
    with pytest.raises(ValueError, match=r"got \[4, 3\] and 0"):
        kmeans(torch.zeros(4, 3), 0)


def test_patches_are_in_the_order_of_the_codes():
    images = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    patches = image_patches(images, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4].reshape(3, 2, 2), images[1, :, 2:4, 2:4])


def test_grain_is_noise_from_the_seed():
    images = torch.full((2, 3, 64, 64), 0.5)
    noisy = with_grain(images, 0.05, seed=3)
    assert torch.equal(noisy, with_grain(images, 0.05, seed=3))
    assert not torch.equal(noisy, with_grain(images, 0.05, seed=4))
    assert (noisy - images).std().item() == pytest.approx(0.05, rel=0.05)
    loud = with_grain(images, 5.0, seed=3)
    assert loud.min() == pytest.approx(-0.1) and loud.max() == pytest.approx(1.1)


def check_health(train: list[Pair], val: list[Pair], codes: int, steps: int, out: Path) -> tuple[float, float, float]:
    """Train with so many codes: the share of them in use on held-out images, its error, and the error of k-means."""
    cfg = replace(PRESETS["tiny"].dvae, vocab_size=codes)
    settings = replace(TRAIN_PRESETS["tiny"].dvae, steps=steps, lr_steps=steps, tau_steps=steps, warmup_steps=30)
    dvae, _ = train_dvae(train, None, cfg, settings, out)
    images = stack_images(val)
    found = dvae.encode(images)
    centroids = kmeans(image_patches(stack_images(train), cfg.downsampling).flatten(0, 1), codes)
    patches = image_patches(images, cfg.downsampling).flatten(0, 1)
    plain = (centroids[nearest(patches, centroids)] - patches).square().mean()
    return len(found.unique()) / codes, (dvae.decode(found) - images).square().mean().item(), plain.item()


def test_health_on_emoji(tmp_path: Path) -> None:
    """Better than k-means patches at 5 bits per code. At 7 bits it takes longer: benchmarks/dvae_health.py."""
    emoji = pytest.importorskip("dalle_fast.data.emoji", exc_type=ImportError)
    try:
        emoji.find_font()
    except FileNotFoundError:
        pytest.skip("Noto Color Emoji is not installed")
    emoji.make_emoji_corpus(tmp_path / "emoji", size=32)
    train, val = (list(open_pairs(tmp_path / "emoji" / split)) for split in ("train", "val"))
    used, error, plain = check_health(train, val, codes=32, steps=600, out=tmp_path / "system")
    assert used > 0.5
    assert error < plain


def test_codes_stay_in_use_on_scenes(tmp_path: Path) -> None:
    used, _, _ = check_health(list(SceneCorpus(1_000)), list(SceneCorpus(128, seed=1)), 128, 150, tmp_path)
    assert used > 0.5
