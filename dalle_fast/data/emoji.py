"""A small corpus of real captioned images: the emoji of Noto Color Emoji with their Unicode names."""

from __future__ import annotations

import hashlib
import subprocess
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from ..files import new_folder
from .augment import center_crop_resize

try:
    import emoji as unicode_emoji
except ImportError:
    raise ImportError("emoji: expected the package with the names, got none; try: pip install emoji") from None

_FONT_FILE = "NotoColorEmoji.ttf"
_FONT_FOLDERS = ("/usr/share/fonts/truetype/noto", "/usr/share/fonts/noto", "/usr/share/fonts/google-noto-emoji")
_FONT_SIZE = 109  # the only size of the font's bitmaps
_CANVAS = (160, 152)  # an emoji is 136 x 128 pixels; a margin, so that clipping shows
_VAL_SHARE = 10  # one base emoji in this many
_SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
_VARIATION_SELECTOR = "\ufe0f"


def find_font() -> Path:
    """The font file: in the usual folders, else wherever fontconfig knows it. FileNotFoundError says how to get it."""
    for folder in _FONT_FOLDERS:
        if (path := Path(folder, _FONT_FILE)).is_file():
            return path
    try:
        command = ["fc-match", "--format=%{file}", "Noto Color Emoji"]
        path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        path = Path()
    if path.name != _FONT_FILE:  # fontconfig returns the nearest font if it lacks this one
        raise FileNotFoundError(f"font: expected {_FONT_FILE}, got none; try: apt-get install fonts-noto-color-emoji")
    return path


def base_emoji(characters: str) -> str:
    """The emoji without its skin tones and variation selectors. The split keeps all variants of it together."""
    return "".join(c for c in characters if c not in _SKIN_TONES and c != _VARIATION_SELECTOR)


def caption_of(characters: str, language: str) -> str | None:
    """The Unicode name in words, "thumbs up medium skin tone"; None if the language has no name for it."""
    name = unicode_emoji.EMOJI_DATA[characters].get(language)
    return name.strip(":").replace("_", " ") if name else None


def in_validation(characters: str) -> bool:
    return zlib.crc32(base_emoji(characters).encode()) % _VAL_SHARE == 0


def render(characters: str, font: ImageFont.FreeTypeFont) -> np.ndarray | None:
    """The emoji on white, uint8 [152, 152, 3] cut from the middle; None if the font has no single glyph for it.

    A sequence that the font cannot join comes out as several glyphs side by side, an unknown emoji as nothing.
    """
    left, top, right, bottom = font.getbbox(characters)
    if right - left > font.getlength("\U0001f600") + 1 or bottom <= top:
        return None
    canvas = Image.new("RGBA", _CANVAS, "white")
    origin = ((_CANVAS[0] - right + left) // 2 - left, (_CANVAS[1] - bottom + top) // 2 - top)
    ImageDraw.Draw(canvas).text(origin, characters, font=font, embedded_color=True)
    image = np.array(canvas.convert("RGB"))
    return None if (image == 255).all() else image


def make_emoji_corpus(
    out: str | Path, size: int = 64, language: str = "en", font: str | Path | None = None
) -> dict[str, int]:
    """Write ``train/`` and ``val/``, folders of ``.png`` and ``.txt`` that ``open_pairs`` reads, and print the counts.

    Every image occurs once. One base emoji in ten, with all its skin tones, is held out for validation.

    Args:
        out: a new folder.
        size: edge of the images in pixels.
        language: of the captions: en, de, es, fr, ja, ...; names come from the ``emoji`` package.
        font: Noto Color Emoji; found when not given.

    Returns:
        the number of pairs in each split.

    Raises:
        ValueError: an unknown language, a size below 1, an output folder that is not new, another font.
        FileNotFoundError: the font is not installed.
        RuntimeError: Pillow lacks RAQM, which joins sequences such as flags and families.
    """
    if language not in unicode_emoji.LANGUAGES:
        raise ValueError(f"language: expected one of {', '.join(unicode_emoji.LANGUAGES)}, got {language!r}")
    if size < 1:
        raise ValueError(f"size: expected 1 or more, got {size}")
    if not features.check("raqm"):
        raise RuntimeError("Pillow: expected a build with RAQM text layout, got one without; try: pip install Pillow")
    unicode_emoji.config.load_language(language)
    path = find_font() if font is None else Path(font)
    try:
        loaded = ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise ValueError(f"font: expected Noto Color Emoji, got {path} ({error})") from None
    counts = {"train": 0, "val": 0}
    seen: set[bytes] = set()
    with new_folder(out) as folder:
        for split in counts:
            (folder / split).mkdir()
        for characters, data in unicode_emoji.EMOJI_DATA.items():
            caption = caption_of(characters, language)
            if data["status"] != unicode_emoji.STATUS["fully_qualified"] or caption is None:
                continue
            image = render(characters, loaded)
            if image is None:
                continue
            digest = hashlib.sha256(image.tobytes()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            split = "val" if in_validation(characters) else "train"
            stem = "-".join(f"{ord(c):x}" for c in characters)
            Image.fromarray(center_crop_resize(image, size)).save(folder / split / f"{stem}.png")
            (folder / split / f"{stem}.txt").write_text(caption + "\n", encoding="utf-8")
            counts[split] += 1
    print(f"{out}: {counts['train']} pairs to train on, {counts['val']} for validation")
    return counts
