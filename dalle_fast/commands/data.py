"""Commands that make and prepare data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from .common import Model, Source, open_source, report

if TYPE_CHECKING:
    import numpy as np


def encode(data: Source, out: Path, model: Model = "tiny", batch_size: int = 64) -> None:
    """Encode the images of a source once, so that training the transformer need not do it again and again.

    Args:
        out: New folder for codes and captions; ``train dalle --data`` takes it.
        batch_size: Images encoded together.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    from ..data import BrokenSample, center_crop_resize, collate, write_encoded
    from ..pipeline import dvae_fingerprint, find_system, load_dvae

    system = find_system(model)
    dvae = load_dvae(system)
    pairs = open_source(data)
    broken: list[str] = []

    def samples() -> Iterator[tuple[np.ndarray, str]]:
        batch: list[dict[str, Any]] = []
        for i in range(len(pairs)):
            try:
                image, caption = pairs[i]
                batch.append({"image": center_crop_resize(image, dvae.cfg.image_size), "caption": caption})
            except BrokenSample as error:
                broken.append(str(error))
            if batch and (len(batch) == batch_size or i == len(pairs) - 1):
                whole = collate(batch)
                yield from zip(dvae.encode(whole["image"]).numpy(), whole["caption"], strict=True)
                batch.clear()

    count = write_encoded(out, samples(), dvae_fingerprint(system))
    report("broken samples", broken)
    print(f"{out}: {count} images as {dvae.cfg.grid} x {dvae.cfg.grid} codes")


def data(
    corpus: Positional[Literal["emoji"]], out: Path, size: int = 64, language: str = "en", font: Path | None = None
) -> None:
    """Make a corpus: the emoji of Noto Color Emoji with their names, in folders train and val.

    Args:
        corpus: Which corpus.
        out: New folder.
        size: Edge of the pictures in pixels.
        language: Of the captions, such as en, de, ja.
        font: The font's file, where it is not found by itself.
    """
    from ..data.emoji import make_emoji_corpus

    make_emoji_corpus(out, size, language, font)
