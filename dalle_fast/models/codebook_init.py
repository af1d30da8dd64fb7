"""Initial codes of a dVAE from k-means of image patches, which is also the baseline that a dVAE is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dvae import DiscreteVAE, map_pixels

_CHUNK = 65_536  # points whose distances to all centroids are in memory at once
_RIDGE = 1e-3  # of the least squares, as a share of the features' mean variance


@torch.no_grad()
def init_codes(dvae: DiscreteVAE, images: torch.Tensor, margin: float = 3.0, seed: int = 0) -> None:
    """Start a dVAE as a quantizer of patches, so that all its codes are in use from the first step.

    From a random start nearly every patch prefers the same few codes, and a short training collapses onto them.
    The codes are k-means centroids c_k of the patches of the images. The encoder's last convolution is set to
    s (c_k p - |c_k|^2 / 2), where p is the patch as a linear function of the features that it sees, fitted by least
    squares: its logits are negative squared distances. The codebook holds the principal components of the centroids,
    so that similar codes have similar vectors.

    Args:
        dvae: changed in place.
        images: float [B, 3, S, S] in [0, 1]. They should have many more different patches than there are codes.
        margin: mean distance of the best logit from the second.
        seed: seed of k-means.
    """
    patches = image_patches(images, dvae.cfg.downsampling).flatten(0, 1)  # [n, D]
    centroids = kmeans(patches, dvae.cfg.vocab_size, seed)  # [K, D]
    features = F.relu(dvae.encoder.blocks[:-1](map_pixels(images))).permute(0, 2, 3, 1).flatten(0, 2)  # [n, C]
    mean, patch_mean = features.mean(0), patches.mean(0)
    centred = features - mean
    covariance = centred.T @ centred
    covariance.diagonal().add_(_RIDGE * covariance.diagonal().mean() + 1e-12)
    slope = torch.linalg.solve(covariance, centred.T @ (patches - patch_mean))  # [C, D]

    w = centroids @ slope.T
    b = centroids @ (patch_mean - mean @ slope) - centroids.square().sum(1) / 2
    logits = features @ w.T + b
    best = logits.topk(2).values
    spread = (best[:, 0] - logits.mean(1)).mean()
    # With fewer distinct patches than codes some centroids are equal, and the best two logits may be too.
    gap = torch.maximum((best[:, 0] - best[:, 1]).mean(), 0.02 * spread)
    scale = margin / gap.clamp(min=1e-6)
    conv = dvae.encoder.blocks.output.conv
    conv.w.copy_(scale * w[:, :, None, None])
    conv.b.copy_(scale * b)

    u, s, _ = torch.linalg.svd(centroids - centroids.mean(0), full_matrices=False)
    components = (u * s)[:, : dvae.cfg.n_init]
    components /= components.std().clamp(min=1e-6)
    dvae.decoder.blocks.input.w[:, :, 0, 0].T[:, : components.shape[1]].copy_(components)


def image_patches(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images [B, C, H, W] cut into squares: [B, H / size * W / size, C * size * size], rows first."""
    return F.unfold(images, size, stride=size).transpose(1, 2)


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index of the centroid [K, D] nearest to each point [n, D]: int64 [n]."""
    bias = centroids.square().sum(1)
    return torch.cat([(bias - 2 * chunk @ centroids.T).argmin(1) for chunk in points.split(_CHUNK)])


def kmeans(points: torch.Tensor, k: int, seed: int = 0, max_rounds: int = 100, tolerance: float = 1e-4) -> torch.Tensor:
    """Centroids [k, D] of points [n, D]: Lloyd's rounds from a k-means++ start (Arthur and Vassilvitskii, 2007).

    Ends when a round lowers the mean squared distance by a share below ``tolerance``, or after ``max_rounds``. With
    fewer than k distinct points, some centroids are equal.

    Raises:
        ValueError: no points, or k below 1.
    """
    if points.ndim != 2 or len(points) == 0 or k < 1:
        raise ValueError(f"kmeans: expected points [n, D] and k of 1 or more, got {list(points.shape)} and {k}")
    generator = torch.Generator(points.device).manual_seed(seed)
    centroids = points[torch.randint(len(points), (1,), generator=generator, device=points.device)]
    distance = (points - centroids).square().sum(1)
    for _ in range(1, k):
        weights = distance if distance.sum() > 0 else torch.ones_like(distance)
        new = points[torch.multinomial(weights, 1, generator=generator)]
        distance = torch.minimum(distance, (points - new).square().sum(1))
        centroids = torch.cat([centroids, new])
    error = distance.mean()
    for _ in range(max_rounds):
        assigned = nearest(points, centroids)
        counts = torch.bincount(assigned, minlength=k)[:, None]
        sums = torch.zeros_like(centroids).index_add_(0, assigned, points)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
        last, error = error, (points - centroids[assigned]).square().sum(1).mean()
        if error > (1 - tolerance) * last:
            break
    return centroids
