"""Decode image files to uint8 RGB. The files are of strangers: few formats, few pixels, the same reason each time."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from contextlib import suppress

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

try:
    import simplejpeg
except ImportError:  # optional: the same pixels in half the time
    simplejpeg = None

MAX_PIXELS = 50_000_000  # of an image, by its header
MAX_FILE_SIZE = 1 << 28  # bytes; 50 million pixels take 200 MB without compression
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # never Pillow's others: its reader of EPS runs Ghostscript

_HEADER = 1 << 16  # bytes; most formats state the size within these
_STRIP = 1 << 22  # pixels that are converted at once
_MAX_MEMORY = 520_000_000  # bytes of a file, its decoder and its pixels
# The first bytes of other files, and of damaged ones, for reasons.
_SIGNATURES = (
    ("a damaged JPEG", rb"\xff\xd8\xff"),
    ("a damaged PNG", rb"\x89PNG"),
    ("a damaged WEBP", rb"RIFF....WEBP"),
    ("a damaged GIF", rb"GIF8[79]a"),
    ("a damaged TIFF", rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]"),
    ("a damaged BMP", rb"BM....\0\0\0\0"),
    ("EPS", rb"%!PS|\xc5\xd0\xd3\xc6"),
    ("PDF", rb"%PDF"),
    ("HTML", rb"(?i)\s*<(!doctype html|html|head|body)"),
    ("SVG", rb"(?is)\s*(<\?xml.*)?<svg"),
    ("XML", rb"\s*<\?xml"),
    ("AVIF", rb"....ftypavi[fs]"),
    ("HEIC", rb"....ftyp(hei[cmsx]|hev[cmx]|mif1|msf1)"),
    ("JPEG 2000", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"),
    ("JPEG XL", rb"\0\0\0\x0cJXL |\xff\x0a"),
    ("PSD", rb"8BPS"),
    ("ICO", rb"\0\0[\x01\x02]\0[^\0]"),
    ("ICNS", rb"icns"),
    ("DDS", rb"DDS "),
    ("BLP", rb"BLP[12]"),
    ("FITS", rb"SIMPLE  ="),
    ("HDF5", rb"\x89HDF"),
    ("GRIB", rb"GRIB"),
    ("WMF", rb"\xd7\xcd\xc6\x9a|\x01\0\x09\0"),
    ("EMF", rb"\x01\0\0\0.{36} EMF"),
    ("QOI", rb"qoif"),
    ("PPM", rb"P[1-7fF]\s"),
    ("XPM", rb"/\* XPM \*/"),
    ("FLI", rb"....[\x11\x12]\xaf"),
    ("SGI", rb"\x01\xda"),
    ("PCX", rb"\x0a[\0-\x05]\x01"),
    ("gzip", rb"\x1f\x8b"),
    ("ZIP", rb"PK\x03\x04"),
)

# Pillow warns of most damages, which are reported otherwise; filters of the program itself come first.
warnings.filterwarnings("ignore", module=r"PIL\.", append=True)


def decode_image(content: bytes) -> np.ndarray:
    """The pixels of an image file as uint8 [H, W, 3]: upright by its EXIF tag, transparency over white.

    The first frame of an animation. It takes at most 520 MB, the file and the result included.

    Raises:
        OSError: another format, or more pixels than MAX_PIXELS.
        Exception: for broken content, of any type that Pillow raises. Messages are the same each time.
    """
    with _open(content, len(content)) as file:
        if simplejpeg and file.format == "JPEG" and file.mode in ("RGB", "L") and _orientation(file) == 1:
            with suppress(ValueError):  # Pillow decides about damaged files, with or without this package
                return simplejpeg.decode_jpeg(content)
        file.load()
        orientation = _orientation(file)  # a PNG may state it behind its pixels
        pixels = np.empty((file.height, file.width, 3), np.uint8)
        rows = max(1, _STRIP // file.width)
        for top in range(0, file.height, rows):
            bottom = min(top + rows, file.height)
            pixels[top:bottom] = _rgb(file.crop((0, top, file.width, bottom)))
    del file  # its pixels
    return np.ascontiguousarray(_upright(pixels, orientation))


def read_image_size(read: Callable[[int], bytes], length: int) -> tuple[int, int]:
    """Width and height of an image file of ``length`` bytes; ``read(n)`` returns its first n bytes.

    Most images need a few of them. Raises what ``decode_image`` does for the header.
    """
    _check_length(length)
    try:
        return _stated_size(read(min(length, _HEADER)), length)
    except Exception:  # Pillow raises it for a longer header, and for damaged bytes
        if length <= _HEADER:
            raise
        return _stated_size(read(length), length)


def reason_of(error: BaseException) -> str:
    """The reason in reports: type and message of an error, the same each time, without addresses in memory."""
    return f"{type(error).__name__}: {_stable(str(error))}".removesuffix(": ")


def _stable(message: str) -> str:
    return re.sub(r"<([\w.]+)[^<>]*? at 0x[0-9a-fA-F]+>| at 0x[0-9a-fA-F]+", r"\1", message)


def _stated_size(content: bytes, length: int) -> tuple[int, int]:
    with _open(content, length) as file:  # reads no pixels
        return file.size


def _open(content: bytes, length: int) -> Image.Image:
    """An image file of ``length`` bytes, of which the first, at least, are here; its pixels are still to be read.

    Raises:
        OSError: another format, or too many pixels.
    """
    _check_length(length)
    try:
        file = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"expected {', '.join(FORMATS)}, got {_kind_of(content)}") from None
    except Image.DecompressionBombError as error:  # its limit is four times ours
        raise OSError(f"expected at most {MAX_PIXELS:,} pixels, got more: {error}") from None
    most = min(MAX_PIXELS, (_MAX_MEMORY - length) // _bytes_per_pixel(file))
    if not 0 < file.width * file.height <= most:
        file.close()
        raise OSError(f"expected 1 to {most:,} pixels, got {file.width} x {file.height}")
    return file


def _check_length(length: int) -> None:
    if length > MAX_FILE_SIZE:
        raise OSError(f"expected at most {MAX_FILE_SIZE:,} bytes, got {length:,}")


def _kind_of(content: bytes) -> str:
    """The format of a file that is not read, or else its first bytes."""
    kinds = (kind for kind, start in _SIGNATURES if re.match(start, content[:256], re.DOTALL))
    return next(kinds, f"a file that begins with {content[:8]!r}" if content else "an empty file")


def _bytes_per_pixel(file: Image.Image) -> int:
    """Bytes per pixel that an image takes at most, in its decoder or beside the result."""
    if isinstance(file, WebPImagePlugin.WebPImageFile):
        return 16  # the canvas, the frame before and a copy
    if isinstance(file, TiffImagePlugin.TiffImageFile):
        return 12  # a single strip of 8 bytes per pixel
    if isinstance(file, JpegImagePlugin.JpegImageFile) and file.info.get("progressive"):
        return 4 + 2 * len(file.layer)  # coefficients of 16 bits
    return 7


def _orientation(file: Image.Image) -> int:
    return file.getexif().get(ExifTags.Base.Orientation, 1)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """A view of pixels [H, W, 3], turned and mirrored as an EXIF tag says."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]


def _rgb(strip: Image.Image) -> np.ndarray:
    """Some rows of an image as uint8 [H, W, 3]."""
    if strip.mode == "F":
        raise OSError("expected integers for pixels, got floating-point numbers")
    if strip.mode == "I" or strip.mode.startswith("I;16"):  # Pillow would clip 16 bits to 255
        values = np.asarray(strip)
        if values.dtype.itemsize > 2:
            values = values.clip(0, 65535).astype(np.uint16)
        grey = (values >> 8).astype(np.uint8)
        if isinstance(transparent := strip.info.get("transparency"), int):
            grey[values == transparent] = 255
        return np.repeat(grey[..., None], 3, axis=2)
    if strip.has_transparency_data:
        strip = strip.convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
    return np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
