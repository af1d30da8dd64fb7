"""Pictures of pictures: grids with captions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

MIN_EDGE = 128  # pixels that a picture is shown with at least
GAP = 6  # pixels between pictures


def contact_sheet(images: torch.Tensor, labels: Sequence[str] = (), columns: int = 4) -> Image.Image:
    """Lay out images in rows, each over its label. images: float [B, 3, S, S] in [0, 1]."""
    edge = images.shape[-1] * max(1, round(MIN_EDGE / images.shape[-1]))
    font = ImageFont.load_default(11)
    lines = [_wrap(label, font, edge) for label in labels]
    text_height = 14 * max((len(line) for line in lines), default=0)
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    cell_width, cell_height = edge + GAP, edge + text_height + GAP
    sheet = Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for i, picture in enumerate(pixels):
        left, top = GAP + i % columns * cell_width, GAP + i // columns * cell_height
        sheet.paste(Image.fromarray(picture).resize((edge, edge), Image.Resampling.NEAREST), (left, top))
        for j, line in enumerate(lines[i] if i < len(lines) else ()):
            pen.text((left, top + edge + 14 * j), line, fill="black", font=font)
    return sheet


def _wrap(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break a label into lines that are at most ``width`` pixels long; a newline breaks, too."""
    lines: list[str] = []
    for paragraph in label.split("\n"):
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) <= width or not lines[-1]:
                lines[-1] = longer
            else:
                lines.append(word)
    return lines


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a picture, complete or not at all; the format follows the name.

    Raises:
        ValueError: a name whose ending is no picture format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        image.save(temporary)
    except ValueError as error:
        raise ValueError(f"picture: expected a name such as out.png, got {path.name!r}") from error
    os.replace(temporary, path)
