"""Commands that make pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from ..demo import DEMO_STEPS
from .common import Model

if TYPE_CHECKING:
    import numpy as np

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def demo(
    out: Path = Path("demo-out"), pairs: int = 20_000, captions: int = 40, steps: tuple[int, int, int] = DEMO_STEPS
) -> None:
    """Train a small system on drawn scenes from nothing, let it draw, and judge it. About 11 minutes on two cores.

    Args:
        out: Folder for the models, pictures and metrics. A demo that was stopped goes on from there.
        pairs: Scenes drawn for training.
        captions: Captions to judge, of those seen in training and of those held out.
        steps: Updates of the dVAE, of the transformer, of the reranker.
    """
    from ..demo.run import run

    print(json.dumps(run(out, pairs, captions, steps), indent=2))


def generate(
    caption: Positional[str],
    out: Path = Path("out.png"),
    model: Model = "tiny",
    n: int = 64,
    top: int = 8,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float | None = None,
    weights: Literal["float32", "bfloat16", "int8"] = "float32",
    device: str = "cpu",
    image_prompt: Path | None = None,
    rows: int = 0,
    columns: int = 0,
) -> None:
    """Draw pictures for a caption and keep those that fit it best.

    Args:
        caption: What to draw, such as "a red circle above a blue square".
        out: Picture to write, the best first.
        n: Candidates to draw.
        top: Candidates to keep, chosen by CLIP.
        seed: The same seed draws the same pictures again.
        temperature: Below 1 is more likely, above 1 more varied.
        top_k: Draw each code from the so many likeliest.
        top_p: Draw each code from the likeliest that add up to this probability.
        guidance: Weight of the caption against no caption; 1 is no guidance, none is the model's own weight.
        weights: What the transformer's weights are rounded to for drawing on a CPU; fewer bits are faster.
        device: Where the models run, such as cuda.
        image_prompt: Picture to go on from.
        rows: Rows of codes of the image prompt to keep.
        columns: Columns of codes of the image prompt to keep.
    """
    _check_picture_name(out)
    picture = None if image_prompt is None else _read_picture(image_prompt)
    from ..pipeline import TextToImage

    pipe = TextToImage.load(model, weights, device)
    result = pipe(caption, n, top, seed, temperature, top_k, top_p, guidance, picture, rows, columns)
    result.save(out)
    print(f"{out}: best {top} of {n}, scores {', '.join(f'{score:.2f}' for score in result.scores.tolist())}")


def reconstruct(images: Positional[tuple[Path, ...]], out: Path = Path("out.png"), model: Model = "tiny") -> None:
    """Encode pictures and decode them again: how much the image codes can say.

    Args:
        images: Picture files.
        out: Picture to write: each picture beside its reconstruction.
    """
    _check_picture_name(out)
    if not images:
        raise ValueError("images: expected at least one picture, got none")
    pictures = [_read_picture(path) for path in images]
    import torch

    from ..data import center_crop_resize, collate
    from ..figures import contact_sheet, save_image
    from ..pipeline import find_system, load_dvae

    dvae = load_dvae(find_system(model))
    originals = collate([{"image": center_crop_resize(picture, dvae.cfg.image_size)} for picture in pictures])["image"]
    copies = dvae.decode(dvae.encode(originals))
    pairs = torch.stack([originals, copies], 1).flatten(0, 1)
    labels = [label for path in images for label in (path.name, "reconstruction")]
    save_image(contact_sheet(pairs, labels), out)
    print(f"{out}: mean squared error {(copies - originals).square().mean().item():.5f}")


def _check_picture_name(path: Path) -> None:
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"out: expected a name that ends in {', '.join(PICTURES)}, got {path}")


def _read_picture(path: Path) -> np.ndarray:
    """The pixels of a file, uint8 [H, W, 3]."""
    from ..data.images import decode_image

    content = path.read_bytes()
    try:
        return decode_image(content)
    except Exception as error:  # on damaged bytes Pillow's decoders raise nearly anything
        raise ValueError(f"picture: expected an image file, got {path} ({error})") from error
