"""Decode image files to uint8 RGB."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from PIL import ExifTags, Image, ImageOps

try:
    import simplejpeg
except ImportError:  # optional: the same pixels in half the time
    simplejpeg = None

_HEADER = 1 << 16  # bytes; most formats state the size within these


def decode_image(content: bytes) -> np.ndarray:
    """The pixels of an image file as uint8 [H, W, 3]: upright by its EXIF tag, transparency over white.

    Pillow's own errors (OSError, ValueError, SyntaxError, ...) pass through for broken content.
    """
    with Image.open(io.BytesIO(content)) as file:
        if simplejpeg and file.format == "JPEG" and file.mode in ("RGB", "L") and _is_upright(file):
            with suppress(ValueError):  # Pillow decides about damaged files, with or without this package
                return simplejpeg.decode_jpeg(content)
        image = ImageOps.exif_transpose(file)
        if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 255
            grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
            return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return np.array(image.convert("RGB"))


def _is_upright(file: Image.Image) -> bool:
    return file.getexif().get(ExifTags.Base.Orientation, 1) == 1


def read_image_size(read: Callable[[int], bytes], length: int) -> tuple[int, int]:
    """Width and height of an image file of ``length`` bytes; ``read(n)`` returns its first n bytes.

    Most images need a few of them. Pillow's own errors pass through for broken content.
    """
    try:
        return _stated_size(read(min(length, _HEADER)))
    except Exception:  # Pillow raises it for a longer header, and for damaged bytes
        if length <= _HEADER:
            raise
        return _stated_size(read(length))


def _stated_size(content: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(content)) as file:  # reads no pixels
        return file.size
