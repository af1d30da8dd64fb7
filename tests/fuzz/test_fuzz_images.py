"""Damaged image files: pixels or BrokenSample with a reason, in little time; the same the next time."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from helpers.fuzz import moved, overwritten, time_limit, tries
from PIL import Image

from dalle_fast.data import BrokenSample, images, open_pairs

NOISE = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)
RGBA = Image.fromarray(NOISE)
EXIF = Image.Exif()
EXIF[0x0112] = 6


def file_of(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


RGB, GREY, PALETTE = RGBA.convert("RGB"), RGBA.convert("L"), RGBA.convert("RGB").quantize(17)
MORE = {"save_all": True, "append_images": [RGB.rotate(9)]}
FILES = {
    "JPEG": [
        file_of(RGB, "JPEG", exif=EXIF),
        file_of(GREY, "JPEG", progressive=True),
        file_of(RGBA.convert("CMYK"), "JPEG"),
    ],
    "PNG": [
        file_of(RGBA, "PNG", exif=EXIF),
        file_of(PALETTE, "PNG", transparency=3),
        file_of(GREY.convert("I;16"), "PNG"),
        file_of(RGB, "PNG", **MORE),
    ],
    "WEBP": [file_of(RGBA, "WEBP", lossless=True), file_of(RGB, "WEBP", exif=EXIF), file_of(RGB, "WEBP", **MORE)],
    "BMP": [file_of(RGB, "BMP"), file_of(PALETTE, "BMP"), file_of(RGBA.convert("1"), "BMP")],
    "GIF": [file_of(PALETTE, "GIF", transparency=3), file_of(RGB, "GIF", **MORE)],
    "TIFF": [
        file_of(RGBA, "TIFF", exif=EXIF),
        file_of(RGB, "TIFF", compression="tiff_lzw"),
        file_of(PALETTE, "TIFF", compression="tiff_deflate"),
        file_of(RGBA.convert("1"), "TIFF", compression="group4"),
    ],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", FILES)
def test_damaged_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_format: str) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 20_000)  # to save time
    path = tmp_path / "a.png"
    path.write_bytes(FILES[file_format][0])
    (tmp_path / "a.txt").write_text("a caption")
    pairs = open_pairs(tmp_path)
    kept = 0
    for seed in tries():
        rng = random.Random(f"{file_format} {seed}")
        content, other = (rng.choice(FILES[file_format]) for _ in range(2))
        damaged = overwritten(content, rng, head=64) if rng.random() < 0.7 else moved(content, rng, other)
        path.write_bytes(damaged)
        results = []
        for read in (lambda: pairs.image_size(0), *[lambda: pairs[0]] * (1 + (seed % 4 == 0))):
            try:
                with time_limit(10):
                    results.append(read())
            except BrokenSample as error:
                assert error.reason and " at 0x" not in error.reason, (seed, error)
                results.append(error.reason)
        size, first, second = (*results, results[1])[:3]
        if isinstance(first, str):
            assert first == second, seed
        else:
            kept += 1
            assert first.caption == "a caption"
            height, width, channels = first.image.shape
            assert first.image.dtype == np.uint8 and channels == 3 and 0 < height * width <= 20_000, seed
            assert sorted(size) == sorted((width, height)), seed
            assert np.array_equal(first.image, second.image), seed
    assert 0 < kept < len(tries())  # else nothing was tried
