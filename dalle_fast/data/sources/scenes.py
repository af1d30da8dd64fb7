"""Synthetic captioned scenes: "a red circle above a blue square".

One or two anti-aliased shapes on light, grainy paper, with jittered size, place and shade. Some pairs of objects never
meet in the training split; they make up the held-out split, which asks a model for combinations it has not seen.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..pairs import Pair, Skipped, check_index

SHAPES = ("circle", "square", "triangle")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 215),
    "yellow": (245, 215, 50),
    "orange": (250, 140, 25),
    "purple": (140, 60, 175),
    "cyan": (50, 205, 220),
    "black": (25, 25, 25),
}
RELATIONS = ("above", "below", "left of", "right of")
HELD_OUT_SHARE = 8  # one pair of objects in this many
GRAIN = 0.05  # standard deviation of the noise on every pixel: without it, the flat ground would outweigh the shapes


@dataclass(frozen=True)
class Item:
    """A shape with its colour."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The content of a caption: one item, or two and the relation of the first to the second."""

    first: Item
    relation: str | None = None
    second: Item | None = None

    @property
    def caption(self) -> str:
        return str(self.first) if self.second is None else f"{self.first} {self.relation} {self.second}"

    @property
    def held_out(self) -> bool:
        """True if the two items never meet in the training split, in any order or relation."""
        if self.second is None:
            return False
        pair = " ".join(sorted((str(self.first), str(self.second))))
        return zlib.crc32(pair.encode()) % HELD_OUT_SHARE == 0


def all_items() -> list[Item]:
    return [Item(colour, shape) for colour in COLOURS for shape in SHAPES]


def all_scenes(held_out: bool) -> list[Scene]:
    """Every scene of one split, in a fixed order."""
    pairs = itertools.product(all_items(), RELATIONS, all_items())
    scenes = [Scene(item) for item in all_items()] + [Scene(a, relation, b) for a, relation, b in pairs if a != b]
    return [scene for scene in scenes if scene.held_out == held_out]


# ---------------------------------------------------------------------------------------------- rendering


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Distance in pixels to the outline of a shape of half-extent r centred on 0, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - r
    return np.maximum(y - r, (2 * abs(x) - y - r) / 5**0.5)  # apex up, as wide as high


def _place(scene: Scene, size: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centre x, y and half-extent of each item, in pixels, such that the relation is plain and nothing overlaps."""
    while True:
        radii = rng.uniform(0.14, 0.20, size=2) * size
        a, b = rng.uniform(radii + 1, size - radii - 1, size=(2, 16, 2)).swapaxes(0, 2)  # 16 tries: [16, 2] (x, y) each
        if scene.second is None:
            return [(a[0, 0], a[0, 1], radii[0])]
        apart = b - a if scene.relation in ("above", "left of") else a - b
        along, across = apart[:, ::-1].T if scene.relation in ("above", "below") else apart.T
        good = (along >= radii.sum() + 2) & (abs(across) <= along / 2)
        if good.any():
            i = good.argmax()
            return [(a[i, 0], a[i, 1], radii[0]), (b[i, 0], b[i, 1], radii[1])]


def render(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """One image of the scene, uint8 [size, size, 3]; place, size and shade are random."""
    y, x = np.mgrid[:size, :size] + 0.5
    image = np.full((size, size, 3), 255 * rng.uniform(0.96, 1.0))
    items = [item for item in (scene.first, scene.second) if item]
    for item, (cx, cy, r) in zip(items, _place(scene, size, rng), strict=True):
        colour = np.clip(np.array(COLOURS[item.colour]) * rng.uniform(0.95, 1.05), 0, 255)
        cover = np.clip(0.5 - _signed_distance(item.shape, x - cx, y - cy, r), 0, 1)[..., None]
        image = image * (1 - cover) + colour * cover
    image += rng.normal(0, 255 * GRAIN, image.shape)
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class SceneCorpus:
    """Scenes as image-caption pairs, each rendered when it is read, and the same for the same (seed, index).

    Args:
        n: number of pairs.
        size: edge of an image in pixels.
        seed: of the random choices of scenes and of their images.
        held_out: take the combinations that training never shows.
    """

    n: int = 50_000
    size: int = 32
    seed: int = 0
    held_out: bool = False
    skipped: ClassVar[tuple[Skipped, ...]] = ()

    def __len__(self) -> int:
        return self.n

    def scene(self, index: int) -> Scene:
        """The scene of pair ``index``; one in four has a single item."""
        rng = np.random.default_rng((self.seed, index, 0))
        items = all_items()
        while True:
            first, second = (items[i] for i in rng.integers(len(items), size=2))
            scene = Scene(first, RELATIONS[rng.integers(len(RELATIONS))], second)
            if not self.held_out and rng.random() < 0.25:
                scene = Scene(first)
            if first != second and scene.held_out == self.held_out:
                return scene

    def __getitem__(self, index: int) -> Pair:
        check_index(index, self.n)
        scene = self.scene(index)
        return Pair(render(scene, self.size, np.random.default_rng((self.seed, index, 1))), scene.caption)

    def captions(self) -> Iterator[str]:
        """All captions in order; nothing is rendered."""
        return (self.caption(i) for i in range(self.n))

    def caption(self, index: int) -> str:
        return self.scene(index).caption

    def name(self, index: int) -> str:
        return f"scene {index}"

    def image_size(self, index: int) -> tuple[int, int]:
        return self.size, self.size

    def __iter__(self) -> Iterator[Pair]:
        return (self[i] for i in range(self.n))
