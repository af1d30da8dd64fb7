"""The judge of the demo: reads a scene back from its image, analytically, and compares it with the caption.

It finds the shapes, their colours and their relation; on rendered scenes it is right at least 98 % of the time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..config import Sampling
from ..data.sources.scenes import COLOURS, Item, Scene, SceneCorpus
from ..pipeline import TextToImage

CANDIDATES = 16  # images per caption that is judged
MIN_AREA = 0.02  # share of the image; smaller blobs are specks, and a rendered shape covers at least 0.039
# Area over that of the box as wide as the widest row and as high as the highest column: triangle 1/2, circle pi/4,
# square 1.
TRIANGLE_BELOW, CIRCLE_BELOW = 0.69, 0.89


@dataclass(frozen=True)
class Found:
    """One blob: its item and its centre, in shares of the image's edge."""

    item: Item
    x: float
    y: float


def _components(foreground: torch.Tensor) -> torch.Tensor:
    """Give each 4-connected blob of bool [B, S, S] a number of its own; 0 is background."""
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
    """The items in each image. images: float [B, 3, S, S] in [0, 1]."""
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
            inside = image[:, blob & (far >= far[blob].median())]  # the pixels with the least background in them
            colour = inside.mean(1)
            nearest = (palette - colour).square().sum(1).argmin().item()
            # Coverage of each pixel: its place between background and colour; one pixel of rim is included.
            near = F.max_pool2d(blob[None, None].float(), 3, 1, 1)[0, 0] > 0
            step = colour - paper[:, 0, 0]
            cover = ((image - paper) * step[:, None, None]).sum(0) / step.square().sum()
            cover = cover.clamp(0, 1) * near
            x, y = (cover.sum(0) * place).sum() / cover.sum(), (cover.sum(1) * place).sum() / cover.sum()
            found.append(Found(Item(names[int(nearest)], _shape(cover)), x.item(), y.item()))
        results.append(found)
    return results


def relation_holds(relation: str, first: Found, second: Found) -> bool:
    """Whether the relation is true of the two, along the axis on which they are further apart."""
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dy) > abs(dx):
        return relation == ("above" if dy > 0 else "below")
    return relation == ("left of" if dx > 0 else "right of")


def verdict(scene: Scene, found: list[Found]) -> tuple[bool, bool]:
    """Whether an image shows exactly the items of its scene, and whether they are in the right relation."""
    wanted = [item for item in (scene.first, scene.second) if item is not None]
    if sorted(map(str, wanted)) != sorted(str(f.item) for f in found):
        return False, False
    if scene.second is None or scene.relation is None:
        return True, True
    orders = (found, found[::-1])
    return True, any(a.item == scene.first and relation_holds(scene.relation, a, b) for a, b in orders)


# ---------------------------------------------------------------------------------------------- shares


def share_right(corpus: SceneCorpus, images: torch.Tensor) -> float:
    """Share of the images [B, 3, S, S] of a corpus, in its order, in which exactly their scene is found."""
    return _mean(all(verdict(corpus.scene(i), found)) for i, found in enumerate(detect(images)))


def evaluate(pipe: TextToImage, scenes: Iterable[Scene], seed: int) -> dict[str, float]:
    """Shares of images that show their captions, with ``CANDIDATES`` images per scene.

    ``single``: of all candidates; ``best``: of those that CLIP scores highest; ``any``: of scenes, with at least one
    candidate right. ``items`` and ``relation`` split the verdict on the best: the right shapes in the right colours;
    and, of the images that have them, in the right relation.
    """
    shares: dict[str, list[float]] = {name: [] for name in ("single", "best", "any", "items", "relation")}
    for i, scene in enumerate(scenes):
        result = pipe(scene.caption, n=CANDIDATES, top=CANDIDATES, sampling=Sampling(seed=seed + i))
        verdicts = [verdict(scene, found) for found in detect(result.images)]
        right = [all(both) for both in verdicts]
        items, relation = verdicts[0]
        shares["single"].append(float(np.mean(right)))
        shares["best"].append(right[0])
        shares["any"].append(any(right))
        shares["items"].append(items)
        if items and scene.second is not None:
            shares["relation"].append(relation)
    return {name: _mean(values) for name, values in shares.items() if values}


def _mean(values: Iterable[float]) -> float:
    return round(float(np.mean([float(value) for value in values])), 4)
