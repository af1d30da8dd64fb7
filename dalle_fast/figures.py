"""Figures: contact sheets of images with captions, and plots of a training's logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont

from .files import read_records, write_atomically

if TYPE_CHECKING:
    import numpy as np

MIN_EDGE = 128  # pixels that an image is shown with at least
GAP = 6  # pixels between images
STAGES = ("dvae", "clip", "dalle")

# ---------------------------------------------------------------------------------------------- contact sheets


def contact_sheet(images: torch.Tensor, labels: Sequence[str] = (), columns: int = 4) -> Image.Image:
    """Images in rows, each above its label. images: float [B, 3, S, S] in [0, 1]."""
    edge = images.shape[-1] * max(1, round(MIN_EDGE / images.shape[-1]))
    font = ImageFont.load_default(11)
    lines = [_wrap(label, font, edge) for label in labels]
    text_height = 14 * max((len(line) for line in lines), default=0)
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    cell_width, cell_height = edge + GAP, edge + text_height + GAP
    sheet = Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(to_pillow(images)):
        left, top = GAP + i % columns * cell_width, GAP + i // columns * cell_height
        sheet.paste(image.resize((edge, edge), Image.Resampling.NEAREST), (left, top))
        for j, line in enumerate(lines[i] if i < len(lines) else ()):
            pen.text((left, top + edge + 14 * j), line, fill="black", font=font)
    return sheet


def to_pillow(images: torch.Tensor) -> list[Image.Image]:
    """Images, float [B, 3, S, S] in [0, 1], as Pillow's, 8 bits per value."""
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


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
    """Write an image, complete or not at all; the format follows the name.

    Raises:
        ValueError: a name that does not end in an image format.
    """
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(f"image: expected a name such as out.png, got {path.name!r}")
    write_atomically(path, lambda file: image.save(file, kind), durable=False)


# ---------------------------------------------------------------------------------------------- plots


def plot_logs(out: Path) -> list[Path]:
    """Plot the logs of a system, as far as it is trained: losses.png and, after 16 bits, scales.png.

    Args:
        out: folder of the system; the plots go there too.

    Raises:
        FileNotFoundError: no log.
    """
    logs = {stage: read_records(out / stage / "log.jsonl") for stage in STAGES if (out / stage / "log.jsonl").is_file()}
    if not logs:
        raise FileNotFoundError(f"out: expected the log of a training in {out}, got none")
    plots = [_plot_losses(logs, out / "losses.png")]
    scales = [record for record in logs.get("dalle", []) if isinstance(record.get("log2_scales"), list)]
    scales = [record for record in scales if len(record["log2_scales"]) == len(scales[-1]["log2_scales"])]
    return [*plots, _plot_scales(scales, out / "scales.png")] if scales else plots


def _plot_losses(logs: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Training and validation loss of every stage."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(logs), figsize=(4 * len(logs), 3.2), layout="constrained", squeeze=False)
    for axis, (stage, records) in zip(axes[0], logs.items(), strict=True):
        for name, label in (("loss", "training"), ("val_loss", "held-out data")):
            points = [(record["step"], record[name]) for record in records if _has_number(record, name)]
            axis.plot([step for step, _ in points], [loss for _, loss in points], label=label)
        axis.set(title=stage, xlabel="step", ylabel="loss (nats)")
        axis.legend()
    return _save(figure, path)


def _has_number(record: dict[str, Any], name: str) -> bool:
    return isinstance(record.get(name), (int, float))


def _plot_scales(records: list[dict[str, Any]], path: Path) -> Path:
    """Gradient scale of every resblock, from the first (dark) to the last (bright): the paper's figure 12."""
    plt = _pyplot()
    steps = [record["step"] for record in records]
    resblocks = list(zip(*(record["log2_scales"] for record in records), strict=True))
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for i, scales in enumerate(resblocks):
        axis.plot(steps, scales, color=plt.cm.viridis(i / len(resblocks)), linewidth=0.8)
    axis.set(title=f"gradient scales of {len(resblocks)} resblocks", xlabel="step", ylabel="log2 of the scale")
    return _save(figure, path)


def plot_codes(counts: np.ndarray, path: Path) -> None:
    """Share of each code, the most frequent first."""
    figure, axis = _pyplot().subplots(figsize=(6, 3), layout="constrained")
    axis.bar(range(len(counts)), sorted(counts / counts.sum(), reverse=True), width=1.0)
    axis.set(title=f"{(counts > 0).sum()} of {len(counts)} codes in use", xlabel="code, by use", ylabel="share")
    axis.set_yscale("log")
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # no screen
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=90)
    _pyplot().close(figure)
    return path
