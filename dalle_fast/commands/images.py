"""Commands that generate images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from ..config import Sampling
from ..demo import DEMO_STEPS
from ..files import check_writable, write_atomically
from .common import Model

if TYPE_CHECKING:
    import numpy as np

    from ..pipeline import Result

Captions = Annotated[Positional[tuple[str, ...]], arg(metavar="CAPTION...")]
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
    for name, values in (("pairs", (pairs,)), ("captions", (captions,)), ("steps", steps)):
        if min(values) < 1:
            raise ValueError(f"{name}: expected 1 or more, got {' '.join(map(str, values))}")
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "shipped.png")
    from ..demo.run import run, show_shipped

    show_shipped(out)
    print("A small system from scratch (with the default options, about 11 minutes on two cores):", flush=True)
    print(json.dumps(run(out, pairs, captions, steps), indent=2))


def generate(
    caption: Captions = (),
    out: Path | None = None,
    model: Model = "tiny",
    n: int = 64,
    top: int | None = None,
    sampling: Annotated[Sampling, arg(name="")] = Sampling(),
    weights: Literal["float32", "bfloat16", "int8"] = "float32",
    device: str = "cpu",
    image_prompt: Path | None = None,
    rows: int = 0,
    columns: int = 0,
    truncate: bool = False,
    captions: Path | None = None,
) -> None:
    """Generate images for one or more captions and keep those that match them best.

    Args:
        caption: Text to illustrate, such as "a red circle above a blue square"; several texts need a folder for out.
        out: Output image, a sheet with the best image first; or a folder, for a file per image and scores.json. None is
            out.png for one caption, and the folder out for several.
        n: Number of candidates to generate for each caption.
        top: Number of candidates to keep for each caption, ranked by CLIP; none is 8, or n if that is less.
        weights: Format of the transformer's weights on a CPU; fewer bits are faster.
        device: Device to run on, such as cuda.
        image_prompt: Image to continue.
        rows: Leading rows of codes to keep of the image prompt.
        columns: Leading columns of codes to keep of the image prompt.
        truncate: Cut captions that are longer than the models read, instead of refusing them.
        captions: File with a caption per line, which come after those given as arguments.
    """
    texts = [*caption, *(_read_captions(captions) if captions else ())]
    if not texts:
        raise ValueError("caption: expected at least one, as an argument or in --captions FILE, got none")
    out = out or Path("out.png" if len(texts) == 1 else "out")
    if n < 1 or (top is not None and not 1 <= top <= n):
        raise ValueError(f"n: expected 1 or more, got {n}" if n < 1 else f"top: expected 1 to n = {n}, got {top}")
    as_folder = out.suffix.lower() not in SUFFIXES and (out.is_dir() or not out.suffix)
    if as_folder:
        out.mkdir(parents=True, exist_ok=True)
        check_writable(out / "scores.json")
    elif len(texts) > 1:
        raise ValueError(f"out: expected a folder for {len(texts)} captions, got {out}")
    else:
        _check_out(out)
    prompt = None if image_prompt is None else _read_image(image_prompt)
    from ..pipeline import TextToImage

    pipe = TextToImage.load(model, weights, device)
    for text in texts:
        pipe.tokenizer.encode([text], truncate=truncate)  # all, before the first is drawn
    scores: list[dict[str, object]] = []
    for i, text in enumerate(texts):
        result = pipe(
            text,
            n=n,
            top=top,
            sampling=sampling,
            image_prompt=prompt,
            keep_rows=rows,
            keep_columns=columns,
            truncate=truncate,
        )
        if as_folder:
            scores += _write_images(result, out, i)
        else:
            result.save(out)
        found = ", ".join(f"{score:.2f}" for score in result.scores.tolist())
        name = f"{out}: {text!r}" if len(texts) > 1 else str(out)
        print(f"{name}: best {len(result.scores)} of {n}, scores {found}", flush=True)
    if as_folder:
        write_atomically(out / "scores.json", json.dumps(scores, indent=2, ensure_ascii=False) + "\n")


def _write_images(result: Result, out: Path, number: int) -> list[dict[str, object]]:
    """Write each image of a caption to a file of its own; returns the entries of scores.json."""
    from ..figures import save_image, to_pillow

    entries: list[dict[str, object]] = []
    for place, (image, score) in enumerate(zip(to_pillow(result.images), result.scores.tolist(), strict=True)):
        file = f"{number:04}-{place:02}.png"
        save_image(image, out / file)
        entries.append({"file": file, "caption": result.caption, "place": place, "score": score})
    return entries


def reconstruct(images: Images, out: Path = Path("out.png"), model: Model = "tiny") -> None:
    """Encode images into codes and decode them again, to see how much the codes preserve.

    Args:
        images: Image files.
        out: Output image: a sheet with each image next to its reconstruction.
    """
    _check_out(out)
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


def _check_out(path: Path) -> None:
    """Raise an error for a name that cannot be that of an output image, before there is one."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"out: expected a name that ends in {', '.join(SUFFIXES)}, got {path}")
    if path.is_dir():
        raise ValueError(f"out: expected the name of an image file, got the folder {path}")
    check_writable(path)


def _read_captions(path: Path) -> list[str]:
    """The lines of a file, without empty ones."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"captions: expected UTF-8 text, got another encoding in {path}") from error
    return [line.strip() for line in lines if line.strip()]


def _read_image(path: Path) -> np.ndarray:
    """The pixels of a file, uint8 [H, W, 3]."""
    from ..data.images import decode_image, reason_of

    content = path.read_bytes()
    try:
        return decode_image(content)
    except Exception as error:  # on damaged bytes Pillow's decoders raise nearly anything
        raise ValueError(f"image: expected an image file, got {path} ({reason_of(error)})") from error
