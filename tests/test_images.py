"""Images of strangers: few formats, little memory, and the same reason each time."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers.tars import png
from PIL import Image, ImageOps

from dalle_fast.data import Batches, BrokenSample, images, open_pairs
from dalle_fast.data.images import MAX_PIXELS, decode_image, read_image_size, reason_of


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def blank_png(
    width: int, height: int, depth: int = 1, colour: int = 0, extra: bytes = b"", pixels: bool = True
) -> bytes:
    """A PNG of zeros, compressed without an image in memory."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    row, packer = bytes(1 + (width * depth * channels + 7) // 8), zlib.compressobj(1)
    rows = (packer.compress(row * 64) for _ in range(-(-height // 64) if pixels else 0))
    data = b"".join(rows) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow: here pytest decides, elsewhere images.py

PALETTE = chunk(b"PLTE", bytes([200, 0, 0, 0, 0, 200])) + chunk(b"tRNS", b"\x80")


def size_of(content: bytes) -> tuple[int, int]:
    return read_image_size(lambda n: content[:n], len(content))


# ---------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_the_formats_that_are_read(file_format: str) -> None:
    content = png((250, 0, 0), file_format=file_format)
    assert size_of(content) == (5, 4)
    assert np.abs(decode_image(content).astype(int) - (250, 0, 0)).max() <= 6


@pytest.mark.parametrize(
    "file_format", ["EPS", "PPM", "ICO", "PCX", "SGI", "DDS", "JPEG2000", "TGA", "PDF", "ICNS", "AVIF"]
)
def test_other_formats_are_named(file_format: str) -> None:
    """Pillow could read all but PDF, and EPS by Ghostscript."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, file_format)
    name = {"JPEG2000": "JPEG 2000", "TGA": "a file that begins with"}.get(file_format, file_format)
    for read in (decode_image, size_of):
        with pytest.raises(OSError, match=f"expected JPEG, PNG, WEBP, BMP, GIF, TIFF, got {name}"):
            read(buffer.getvalue())


def test_no_ghostscript(tmp_path: Path) -> None:
    """A program named gs, first in PATH, is not started by an EPS under an image's name."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "cat.eps")
    (tmp_path / "cat.eps").rename(tmp_path / "cat.png")
    (tmp_path / "cat.txt").write_text("a cat")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    code = (
        "from dalle_fast.data import BrokenSample, open_pairs\n"
        f"pairs = open_pairs({str(tmp_path)!r})\n"
        "for read in (pairs.__getitem__, pairs.image_size):\n"
        "    try: read(0)\n"
        "    except BrokenSample as error: print(error)\n"
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert run.stdout.count("got EPS") == 2, run.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_of_an_animation(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    buffer = io.BytesIO()
    options = {"lossless": True} if file_format == "WEBP" else {}
    frames[0].save(buffer, file_format, save_all=True, append_images=frames[1:], **options)
    assert np.abs(decode_image(buffer.getvalue()).astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation(file_format: str, orientation: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    exif = image.getexif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, file_format, exif=exif, **({"lossless": True} if file_format == "WEBP" else {}))
    expected = np.array(ImageOps.exif_transpose(Image.open(buffer)).convert("RGB"))
    result = decode_image(buffer.getvalue())
    assert result.shape == expected.shape
    assert np.abs(result.astype(int) - expected).max() <= 1


# ---------------------------------------------------------------------------------------------- pixels


def test_16_bits_and_transparency() -> None:
    """The colour that is transparent becomes white in all 16 bits alone."""
    values = np.array([[0, 255, 256, 65535, 0x8012, 0x8013]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    assert decode_image(buffer.getvalue())[0, :, 0].tolist() == [0, 0, 1, 255, 128, 128]
    content = buffer.getvalue()
    content = content[:33] + chunk(b"tRNS", b"\x80\x12") + content[33:]
    assert decode_image(content)[0, :, 0].tolist() == [0, 0, 1, 255, 255, 128]


def test_an_image_is_the_same_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (50, 7, 4), dtype=np.uint8)
    rgba = Image.fromarray(noise)
    for image in (rgba, rgba.convert("RGB").quantize(9), rgba.convert("LA"), rgba.convert("1"), rgba.convert("I;16")):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **({"transparency": 3} if image.mode == "P" else {}))
        monkeypatch.setattr(images, "_STRIP", 1 << 22)
        whole = decode_image(buffer.getvalue())
        monkeypatch.setattr(images, "_STRIP", 20)
        assert np.array_equal(decode_image(buffer.getvalue()), whole)


def test_floating_point_pixels_are_not_black() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(buffer, "TIFF")
    with pytest.raises(OSError, match="expected integers for pixels, got floating-point numbers"):
        decode_image(buffer.getvalue())


# ---------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("width", "height"), [(MAX_PIXELS // 1000 + 1, 1000), (13377, 13377), (2**31 - 1, 2**31 - 1)])
def test_too_many_pixels(width: int, height: int) -> None:
    content = blank_png(width, height, pixels=False)
    for read in (decode_image, size_of):
        with pytest.raises(OSError, match=r"expected (at most|1 to) 50,000,000 pixels, got"):
            read(content)


@pytest.mark.parametrize("file_format", ["PNG", "BMP"])
def test_no_pixels(file_format: str) -> None:
    content = bytearray(png(file_format=file_format))
    place, size = {"PNG": (16, 8), "BMP": (18, 8)}[file_format]
    content[place : place + size] = bytes(size)
    if file_format == "PNG":
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with pytest.raises(Exception, match=r"expected|not enough|zero|invalid|tile"):
        decode_image(bytes(content))


MEMORY = """
import sys
from dalle_fast.data.images import decode_image
image = decode_image(sys.stdin.buffer.read())
print(*image.shape, *image[-1, -1], next(line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line))
"""
KINDS = {
    "1 bit": (blank_png, (7071, 7071), (0, 0, 0)),
    "palette": (lambda w, h: blank_png(w, h, 1, 3, PALETTE), (7071, 7071), (227, 127, 127)),
    "16 bits": (lambda w, h: blank_png(w, h, 16), (7071, 7071), (0, 0, 0)),
    "RGBA": (lambda w, h: blank_png(w, h, 8, 6), (7071, 7071), (255, 255, 255)),
    "RGBA of 16 bits": (lambda w, h: blank_png(w, h, 16, 6), (7071, 7071), (255, 255, 255)),
    "WEBP": (lambda w, h: png((9, 9, 9), (w, h), file_format="WEBP", lossless=True, method=0), (5700, 5700), (9, 9, 9)),
    "JPEG": (
        lambda w, h: png((9, 9, 9, 9), (w, h), "CMYK", "JPEG", progressive=True, subsampling=0), (6550, 6550), None
    ),
}  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's peak of memory")
@pytest.mark.parametrize("kind", KINDS)
def test_memory_just_under_the_limit(kind: str) -> None:
    make, (width, height), expected = KINDS[kind]
    run = subprocess.run([sys.executable, "-c", MEMORY], input=make(width, height), capture_output=True)
    assert not run.stderr, run.stderr
    *shape, red, green, blue, peak = map(int, run.stdout.split())
    assert shape == [height, width, 3]
    assert expected is None or (red, green, blue) == expected
    assert peak < 600_000  # kB


def test_pillow_does_not_warn(tmp_path: Path) -> None:
    """Of large images, of damaged EXIF data, of transparent palettes: nothing on stderr."""
    (tmp_path / "large.png").write_bytes(blank_png(10_000, 10_000, pixels=False))
    (tmp_path / "exif.jpg").write_bytes(png(file_format="JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xffabc"))
    (tmp_path / "palette.png").write_bytes(blank_png(9, 9, 1, 3, PALETTE))
    code = (
        "import sys, pathlib\nfrom dalle_fast.data.images import decode_image\n"
        "for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):\n"
        "    try: print(decode_image(path.read_bytes()).shape)\n"
        "    except OSError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert lines == ["(4, 5, 3)", "expected 1 to 50,000,000 pixels, got 10000 x 10000", "(9, 9, 3)"]


# ---------------------------------------------------------------------------------------------- reasons


def test_a_reason_holds_no_address() -> None:
    buffer = io.BytesIO()
    assert reason_of(ValueError(f"cannot read {buffer} and {decode_image}")) == (
        "ValueError: cannot read _io.BytesIO and function"
    )
    assert reason_of(OSError("broken at 0x7fecd22a3ab0")) == "OSError: broken"
    assert reason_of(MemoryError()) == "MemoryError"


REASONS = """
import sys
from dalle_fast.data import BrokenSample, open_pairs
for source in sys.argv[1:]:
    pairs = open_pairs(source, workers=1)
    for i in range(len(pairs)):
        for read in (pairs.__getitem__, pairs.image_size):
            try: read(i)
            except BrokenSample as error: print(error)
"""


def test_reasons_are_the_same_in_two_processes(tmp_path: Path) -> None:
    whole = {kind: png(size=(64, 64), file_format=kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
    broken = {f"short-{kind}": content[: len(content) // 2] for kind, content in whole.items()}
    broken |= {f"header-{kind}": content[:9] for kind, content in whole.items()}
    broken |= {f"damaged-{kind}": content[:20] + b"\xff" * 9 + content[29:] for kind, content in whole.items()}
    broken |= {"html": b"<html>not found</html>", "text": b"x" * 99, "large": blank_png(9999, 9999, pixels=False)}
    folder = tmp_path / "folder"
    folder.mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in broken.items():
            for path, data in ((folder / f"{name}.png", content), (folder / f"{name}.txt", b"a caption")):
                path.write_bytes(data)
                tar.add(path, path.name)
    command = [sys.executable, "-c", REASONS, str(folder), str(tmp_path / "a.tar")]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == second
    assert len(first.splitlines()) >= 2 * len(broken)
    assert " at 0x" not in first
    pairs = open_pairs(folder)
    for i in range(len(pairs)):
        reasons = set()
        for _ in range(3):
            try:
                pairs[i]
            except BrokenSample as error:
                reasons.add(error.reason)
        assert len(reasons) <= 1


@pytest.mark.parametrize("packed", [False, True])
def test_a_broken_image_is_one_line_of_the_report(tmp_path: Path, packed: bool) -> None:
    """However often it is met, in a folder and in a tar."""
    files = {f"{i}.png": png((i, 0, 0)) for i in range(5)}
    files |= {"html.png": b"<html>", "none.png": b"x", "eps.png": b"%!PS-Adobe-3.0", "cut.png": png(size=(64, 64))[:80]}
    folder = tmp_path / "folder"
    folder.mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in files.items():
            for path, data in ((folder / name, content), (folder / f"{Path(name).stem}.txt", b"a caption")):
                path.write_bytes(data)
                tar.add(path, path.name)
    pairs = open_pairs(tmp_path / "a.tar" if packed else folder)
    batches = Batches(pairs, 4, lambda pair, rng: {"caption": pair.caption}, seed=0)
    iterator = batches.iterate()
    for _ in range(50):
        next(iterator)
    batches.write_report(tmp_path / "skipped.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert all(line["count"] > 3 for line in lines)


def test_commands_give_the_reason(cli: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "a.png").write_bytes(b"<html>")
    for command in (["reconstruct", f"{tmp_path}/a.png"], ["generate", "a", "--image-prompt", f"{tmp_path}/a.png"]):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert "expected JPEG, PNG, WEBP, BMP, GIF, TIFF, got HTML" in error and " at 0x" not in error
