"""k-means: where the codes of a dVAE may start, and the plain quantizer that a trained one is measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F

_CHUNK = 65_536  # points whose distances to all centroids are in memory at once


def image_patches(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images [B, C, H, W] cut into squares: [B, H / size * W / size, C * size * size], rows first."""
    return F.unfold(images, size, stride=size).transpose(1, 2)


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index of the centroid [K, D] nearest to each point [n, D]: int64 [n]."""
    bias = centroids.square().sum(1)
    return torch.cat([(bias - 2 * chunk @ centroids.T).argmin(1) for chunk in points.split(_CHUNK)])


def kmeans(points: torch.Tensor, k: int, seed: int = 0, max_rounds: int = 100, tolerance: float = 1e-4) -> torch.Tensor:
    """Centroids [k, D] of points [n, D]: Lloyd's rounds from a k-means++ start (Arthur and Vassilvitskii, 2007).

    It ends when a round lowers the mean squared distance by a share below ``tolerance``, or after ``max_rounds``. Where
    there are fewer than k distinct points, some centroids are equal. Raises ValueError without points or centroids.
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
