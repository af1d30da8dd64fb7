"""Sources of image-caption pairs: good samples are read, broken ones are named and skipped."""

import io
import json
import pickle
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from helpers.sources import captions, skipped, write
from helpers.tars import BLUE, RED, png, shard_of, write_tar
from PIL import Image

from dalle_fast.data import BrokenSample, images, open_pairs
from dalle_fast.data.images import decode_image

# ---------------------------------------------------------------------------------------------- images


def test_transparency_is_over_white() -> None:
    half = decode_image(png((255, 0, 0, 128), mode="RGBA"))
    assert half.shape == (4, 5, 3)
    assert half[0, 0].tolist() == [255, 127, 127]
    assert decode_image(png((0, 0), mode="LA"))[0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=1)
    assert decode_image(buffer.getvalue())[0].tolist() == [[255, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(100, mode="L"), [100] * 3),
        (png(1, mode="1"), [255] * 3),
        (png(100 * 256 + 7, mode="I;16"), [100] * 3),
        (png(RED, file_format="WEBP", lossless=True), list(RED)),
        (png((0, 255, 255, 0), mode="CMYK", file_format="JPEG", quality=100, subsampling=0), list(RED)),
    ],
    ids=["grey", "bilevel", "16 bit", "webp", "cmyk"],
)
def test_other_modes_become_rgb(content: bytes, expected: list[int]) -> None:
    image = decode_image(content)
    assert (image.shape, image.dtype) == ((4, 5, 3), np.uint8)
    assert np.abs(image.astype(int) - expected).max() <= 2


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (16, 8), "white")
    image.paste(RED, (0, 0, 8, 8))
    exif = image.getexif()
    exif[0x0112] = 6  # to be shown turned clockwise: the left half comes to the top
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, quality=100, subsampling=0)
    pixels = decode_image(buffer.getvalue())
    assert pixels.shape == (16, 8, 3)
    assert np.abs(pixels[2, 4].astype(int) - RED).max() <= 2
    assert pixels[13, 4].min() >= 253


def jpeg(size: tuple[int, int], mode: str = "RGB", **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size).convert(mode).save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(64, 48), (33, 17), (1, 1)])
@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {"subsampling": i}) for i in range(3)] + [("RGB", {"progressive": True}), ("L", {})],
    ids=str,
)
def test_simplejpeg_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], mode: str, options: dict
) -> None:
    """Its pixels are within one level of those of Pillow's own decoder."""
    pytest.importorskip("simplejpeg")
    content = jpeg(size, mode, **options)
    decoders = MagicMock(wraps=images.simplejpeg)
    monkeypatch.setattr(images, "simplejpeg", decoders)
    ours = decode_image(content)
    decoders.decode_jpeg.assert_called_once()
    monkeypatch.setattr(images, "simplejpeg", None)
    pillows = decode_image(content)
    assert ours.shape == pillows.shape == (size[1], size[0], 3)
    assert ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - pillows).max() <= 1


def test_damaged_jpegs_are_the_same_with_simplejpeg_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off is broken, rubbish after the end is not."""
    content = jpeg((64, 48))
    longer = decode_image(content + b"rubbish")
    for decoder in (images.simplejpeg, None):
        monkeypatch.setattr(images, "simplejpeg", decoder)
        with pytest.raises(OSError, match="image file is truncated"):
            decode_image(content[:-40])
        assert np.array_equal(decode_image(content + b"rubbish"), longer)


# ---------------------------------------------------------------------------------------------- folder


def test_folder(tmp_path: Path) -> None:
    files = {
        "b.png": png(BLUE),
        "b.txt": " a blue image\n",
        "deep/down/a.v2.JPG": png(RED, file_format="JPEG"),
        "deep/down/a.v2.txt": "\ufeffein röter\nBild".encode(),
        "alone.png": png(),
        "alone-text.txt": "no image",
        "blank.png": png(),
        "blank.txt": " \n",
        "empty.png": b"",
        "empty.txt": "x",
        "latin.png": png(),
        "latin.txt": b"\xe9",
        ".hidden.png": png(),
    }
    pairs = open_pairs(write(tmp_path, files))
    assert captions(pairs) == ["a blue image", "ein röter"]
    assert list(pairs.captions()) == ["a blue image", "ein röter", "Bild"]
    assert (pairs[0].image == BLUE).all()
    assert skipped(pairs) == {
        "alone.png": "no caption",
        "alone-text.txt": "no image",
        "blank.png": "no caption",
        "empty.png": "the image file is empty",
        "latin.png": "the caption is not valid Unicode",
    }
    for index in (-1, 2):
        with pytest.raises(IndexError):
            pairs[index]


@pytest.mark.parametrize("kind", ["text", "PNG", "JPEG", "WEBP"])
def test_broken_image(tmp_path: Path, kind: str) -> None:
    whole = b"not an image" if kind == "text" else png(size=(64, 64), file_format=kind)
    content = whole[: len(whole) // 2]
    pairs = open_pairs(write(tmp_path, {"x/bad.png": content, "x/bad.txt": "bad"}))
    with pytest.raises(BrokenSample, match=r"x/bad\.png: ") as caught:
        pairs[0]
    assert caught.value.name == str(Path("x/bad.png"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_image_that_goes_away(tmp_path: Path) -> None:
    pairs = open_pairs(write(tmp_path, {"a.png": png(), "a.txt": "a"}))
    (tmp_path / "a.png").unlink()
    with pytest.raises(BrokenSample, match="FileNotFoundError"):
        pairs[0]


# ---------------------------------------------------------------------------------------------- manifest


def test_csv_manifest(tmp_path: Path) -> None:
    table = 'caption,image\n"red, or so",images/red.png\nblue,images/blue.png\n,images/red.png\nx,images/none.png\ny,\n'
    write(tmp_path, {"images/red.png": png(RED), "images/blue.png": png(BLUE), "data.csv": "\ufeff" + table})
    pairs = open_pairs(str(tmp_path / "data.csv"))
    assert captions(pairs) == ["red, or so", "blue"]
    assert (pairs[1].image == BLUE).all()
    assert skipped(pairs) == {"data.csv:4": "no caption", "data.csv:5": "no image", "data.csv:6": "no image"}


def test_jsonl_manifest(tmp_path: Path) -> None:
    lines = [
        json.dumps({"image": "red.png", "caption": "red"}),
        '{"image": "red.png", "capt',
        "",
        "[]",
        json.dumps({"image": 3, "caption": "x"}),
        json.dumps({"image": "red.png", "caption": "\ud800"}),
        json.dumps({"image": "red.png", "caption": [3]}),
        json.dumps({"image": "red\0.png", "caption": "red"}),
        json.dumps({"image": "red.png", "caption": "red again"}),
    ]
    pairs = open_pairs(write(tmp_path, {"red.png": png(RED), "data.jsonl": "\n".join(lines)}) / "data.jsonl")
    assert captions(pairs) == ["red", "red again"]
    assert [name for name, _ in pairs.skipped] == [f"data.jsonl:{i}" for i in (2, 4, 5, 6, 7, 8)]


def test_csv_without_the_columns(tmp_path: Path) -> None:
    write(tmp_path, {"data.csv": "url,text\na,b\n"})
    with pytest.raises(ValueError, match="expected the columns image and caption"):
        open_pairs(tmp_path / "data.csv")


# ---------------------------------------------------------------------------------------------- shards


def test_shard(tmp_path: Path) -> None:
    long_name = "folder/" + "n" * 150
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "0001.png": png(RED),
            "0001.txt": "red",
            "0002.json": json.dumps({"caption": " blue "}),
            "0002.seg.png": png(BLUE),
            f"{long_name}.jpg": png(file_format="JPEG"),
            f"{long_name}.txt": "long",
            "0003.png": png(),
            "0004.txt": "no image",
            "0005.png": png(),
            "0005.json": "{",
            "0006.png": png(),
            "0006.json": "[]",
            "0007.png": b"",
            "0007.txt": "empty",
        },
    )
    pairs = open_pairs(shard)
    assert captions(pairs) == ["red", "blue", "long"]
    assert (pairs[1].image == BLUE).all()
    reasons = skipped(pairs)
    assert list(reasons) == [f"a.tar:000{i}" for i in (3, 4, 5, 6, 7)]
    assert reasons["a.tar:0003"] == "no caption"
    assert reasons["a.tar:0005"].startswith("the caption is not JSON")


def test_folders_and_globs_of_shards(tmp_path: Path) -> None:
    shard_of(tmp_path / "b.tar", 3)
    shard_of(tmp_path / "a.tar", 0)
    for source in (tmp_path, tmp_path / "*.tar", f"{tmp_path}/[ab].tar"):
        pairs = open_pairs(source)
        assert captions(pairs) == [f"number {i}" for i in range(6)]
        assert [int(pairs[i].image[0, 0, 0]) for i in range(6)] == list(range(6))
        assert list(pairs.skipped) == []


@pytest.mark.parametrize("cut", [512 + 30, 200, 0])
def test_truncated_shard(tmp_path: Path, cut: int) -> None:
    """Cut in the last sample's image, in its header, or just before that: the samples ahead of the cut are used."""
    whole = shard_of(tmp_path / "a.tar", 0).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.rindex(b"2.png") + cut])
    shard_of(tmp_path / "b.tar", 3)
    pairs = open_pairs(tmp_path)
    assert captions(pairs) == [f"number {i}" for i in (0, 1, 3, 4, 5)]
    assert skipped(pairs)["a.tar"].startswith("truncated or damaged at byte")
    assert skipped(pairs)["a.tar:2"] in ("truncated", "no image")


def test_damaged_shards(tmp_path: Path) -> None:
    whole = bytearray(shard_of(tmp_path / "damaged.tar", 0).read_bytes())
    whole[whole.index(b"1.txt") + 20] ^= 0xFF  # a header's checksum no longer holds
    (tmp_path / "damaged.tar").write_bytes(whole)
    write(tmp_path, {"empty.tar": b"", "other.tar": b"not a tar file" * 100})
    pairs = open_pairs(tmp_path)
    assert captions(pairs) == ["number 0"]
    assert set(skipped(pairs)) == {"damaged.tar", "empty.tar", "other.tar"}
    assert skipped(pairs)["empty.tar"] == "the file is empty"
    assert skipped(pairs)["damaged.tar"].endswith("expected a header or the end mark")


# ---------------------------------------------------------------------------------------------- sources


def test_synthetic_scenes() -> None:
    pairs = open_pairs("scenes")
    assert len(pairs) > 1000
    assert pairs[0].image.dtype == np.uint8
    assert {pairs[i].caption for i in range(100)}.isdisjoint(
        open_pairs("scenes:held-out")[i].caption for i in range(100)
    )


@pytest.mark.parametrize("source", ["nothing", "file.xyz", "none*.tar", "empty", "scene"])
def test_unusable_sources(tmp_path: Path, source: str) -> None:
    write(tmp_path, {"file.xyz": "x"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"source: expected .*, got"):
        open_pairs(tmp_path / source)


def test_a_source_of_nothing_but_bad_samples_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 skipped, the first a\.png: no caption"):
        open_pairs(write(tmp_path, {"a.png": png()}))


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "png", "webp", "bmp", "gif", "tif", "tiff"])
def test_extensions_of_images(extension: str, tmp_path: Path) -> None:
    """In folders and in shards."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), RED).save(file, Image.registered_extensions()[f".{extension.lower()}"])
    files = {f"a.{extension}": file.getvalue(), "a.txt": "red"}
    for pairs in (open_pairs(write(tmp_path / "in", files)), open_pairs(write_tar(tmp_path / "a.tar", files))):
        assert len(pairs) == 1 and pairs.image_size(0) == (8, 8)
        assert np.abs(pairs[0].image.astype(int) - RED).max() < 10
