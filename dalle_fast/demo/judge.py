"""Reads a scene back from its picture, analytically: which shapes, in which colours, standing how to each other.

The judge of the demo. It is itself checked on drawn scenes: at least 98 % right there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..data.sources.scenes import COLOURS, Item, Scene

MIN_AREA = 0.02  # of the picture; smaller blobs are specks, and a drawn shape covers at least 0.039
# Area over the box of the widest row and the highest column: triangle 1/2, circle pi/4, square 1.
TRIANGLE_BELOW, CIRCLE_BELOW = 0.69, 0.89


@dataclass(frozen=True)
class Found:
    """One blob: what it is and its centre, in shares of the picture's edge."""

    item: Item
    x: float
    y: float


def _components(foreground: torch.Tensor) -> torch.Tensor:
    """Label the 4-connected blobs of bool [B, S, S] by a number of their own; 0 is background."""
    b, s, _ = foreground.shape
    label = torch.arange(1, s * s + 1, dtype=torch.float32).view(1, s, s).repeat(b, 1, 1) * foreground
    while True:  # the largest number spreads through its blob
        across = F.max_pool2d(label[:, None], (1, 3), 1, (0, 1))
        down = F.max_pool2d(label[:, None], (3, 1), 1, (1, 0))
        spread = torch.maximum(across, down)[:, 0] * foreground
        if torch.equal(spread, label):
            return label
        label = spread


def _shape(cover: torch.Tensor) -> str:
    """Name a blob from its soft coverage [S, S]."""
    fill = (cover.sum() / (cover.sum(0).max() * cover.sum(1).max())).item()
    return "triangle" if fill < TRIANGLE_BELOW else "circle" if fill < CIRCLE_BELOW else "square"


def detect(images: torch.Tensor) -> list[list[Found]]:
    """What each picture shows. images: float [B, 3, S, S] in [0, 1]."""
    names = list(COLOURS)
    palette = torch.tensor([COLOURS[name] for name in names]) / 255  # [8, 3]
    s = images.shape[-1]
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=2)
    ground = border.median(dim=2).values[:, :, None, None]  # [B, 3, 1, 1]
    distance = (images - ground).abs().amax(1)  # [B, S, S]
    labels = _components(distance > 0.25)
    place = (torch.arange(s) + 0.5) / s
    results = []
    for image, label, far, paper in zip(images, labels, distance, ground, strict=True):
        found = []
        for number in label.unique():
            blob = label == number
            if number == 0 or blob.sum() < MIN_AREA * s * s:
                continue
            inside = image[:, blob & (far >= far[blob].median())]  # the pixels with least ground in them
            colour = inside.mean(1)
            nearest = (palette - colour).square().sum(1).argmin().item()
            # Coverage of each pixel: how far it has gone from the ground to the colour; one pixel of rim included.
            near = F.max_pool2d(blob[None, None].float(), 3, 1, 1)[0, 0] > 0
            step = colour - paper[:, 0, 0]
            cover = ((image - paper) * step[:, None, None]).sum(0) / step.square().sum()
            cover = cover.clamp(0, 1) * near
            x, y = (cover.sum(0) * place).sum() / cover.sum(), (cover.sum(1) * place).sum() / cover.sum()
            found.append(Found(Item(names[int(nearest)], _shape(cover)), x.item(), y.item()))
        results.append(found)
    return results


def relation_holds(relation: str, first: Found, second: Found) -> bool:
    """Whether the first stands so to the second, along the axis on which they are further apart."""
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dy) > abs(dx):
        return relation == ("above" if dy > 0 else "below")
    return relation == ("left of" if dx > 0 else "right of")


def verdict(scene: Scene, found: list[Found]) -> tuple[bool, bool]:
    """Whether a picture shows exactly the items of a scene and nothing else, and in the right relation."""
    wanted = [item for item in (scene.first, scene.second) if item is not None]
    if sorted(map(str, wanted)) != sorted(str(f.item) for f in found):
        return False, False
    if scene.second is None or scene.relation is None:
        return True, True
    orders = (found, found[::-1])
    return True, any(a.item == scene.first and relation_holds(scene.relation, a, b) for a, b in orders)
