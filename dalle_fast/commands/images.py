"""Commands that generate images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ..config import Sampling
from ..demo import DEMO_STEPS
from .common import Model

if TYPE_CHECKING:
    import numpy as np

Images = Annotated[Positional[tuple[Path, ...]], arg(metavar="IMAGE...")]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def demo(
    out: Path = Path("demo-out"), pairs: int = 20_000, captions: int = 40, steps: tuple[int, int, int] = DEMO_STEPS
) -> None:
    """Generate images with the shipped model, then train a small system from scratch and evaluate it.

    The training data are synthetic scenes of coloured shapes. Takes about 11 minutes on two cores.

    Args:
        out: Output folder for models, images and metrics. An interrupted demo resumes from there.
        pairs: Number of training scenes.
        captions: Number of captions to evaluate in each split: seen in training, and held out.
        steps: Training steps of the dVAE, the transformer and CLIP.
    """
    from ..demo.run import run, show_shipped

    show_shipped(out)
    print("A small system from scratch (with the default options, about 11 minutes on two cores):", flush=True)
    print(json.dumps(run(out, pairs, captions, steps), indent=2))


def generate(
    caption: Annotated[Positional[str], arg(metavar="CAPTION")],
    out: Path = Path("out.png"),
    model: Model = "tiny",
    n: int = 64,
    top: int = 8,
    sampling: Annotated[Sampling, arg(name="")] = Sampling(),
    weights: Literal["float32", "bfloat16", "int8"] = "float32",
    device: str = "cpu",
    image_prompt: Path | None = None,
    rows: int = 0,
    columns: int = 0,
) -> None:
    """Generate images for a caption and keep those that match it best.

    Args:
        caption: Text to illustrate, such as "a red circle above a blue square".
        out: Output image: a sheet with the best image first.
        n: Number of candidates to generate.
        top: Number of candidates to keep, ranked by CLIP.
        weights: Format of the transformer's weights on a CPU; fewer bits are faster.
        device: Device to run on, such as cuda.
        image_prompt: Image to continue.
        rows: Leading rows of codes to keep of the image prompt.
        columns: Leading columns of codes to keep of the image prompt.
    """
    _check_suffix(out)
    prompt = None if image_prompt is None else _read_image(image_prompt)
    from ..pipeline import TextToImage

    pipe = TextToImage.load(model, weights, device)
    result = pipe(caption, n=n, top=top, sampling=sampling, image_prompt=prompt, keep_rows=rows, keep_columns=columns)
    result.save(out)
    print(f"{out}: best {top} of {n}, scores {', '.join(f'{score:.2f}' for score in result.scores.tolist())}")


def reconstruct(images: Images, out: Path = Path("out.png"), model: Model = "tiny") -> None:
    """Encode images into codes and decode them again, to see how much the codes preserve.

    Args:
        images: Image files.
        out: Output image: a sheet with each image next to its reconstruction.
    """
    _check_suffix(out)
    if not images:
        raise ValueError("images: expected at least one, got none")
    pixels = [_read_image(path) for path in images]
    import torch

    from ..data import center_crop_resize, collate
    from ..figures import contact_sheet, save_image
    from ..pipeline import find_system, load_dvae

    dvae = load_dvae(find_system(model))
    originals = collate([{"image": center_crop_resize(image, dvae.cfg.image_size)} for image in pixels])["image"]
    copies = dvae.decode(dvae.encode(originals))
    labels = [label for path in images for label in (path.name, "reconstruction")]
    save_image(contact_sheet(torch.stack([originals, copies], 1).flatten(0, 1), labels), out)
    print(f"{out}: mean squared error {(copies - originals).square().mean().item():.5f}")


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"out: expected a name that ends in {', '.join(SUFFIXES)}, got {path}")


def _read_image(path: Path) -> np.ndarray:
    """The pixels of a file, uint8 [H, W, 3]."""
    from ..data.images import decode_image, reason_of

    content = path.read_bytes()
    try:
        return decode_image(content)
    except Exception as error:  # on damaged bytes Pillow's decoders raise nearly anything
        raise ValueError(f"image: expected an image file, got {path} ({reason_of(error)})") from error
