"""The emoji corpus: names and splits without the font, images with it."""

import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from dalle_fast.data import open_pairs

emoji = pytest.importorskip("dalle_fast.data.emoji", exc_type=ImportError)
NAMED = ("\U0001f600", "\U0001f44d", "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f")
DATA = emoji.unicode_emoji.EMOJI_DATA


@pytest.fixture
def font() -> Path:
    try:
        return emoji.find_font()
    except FileNotFoundError:
        pytest.skip("Noto Color Emoji is not installed")


def test_captions_are_names_in_words() -> None:
    assert [emoji.caption_of(characters, "en") for characters in NAMED] == [
        "grinning face",
        "thumbs up",
        "thumbs up medium skin tone",
        "Germany",
        "red heart",
    ]


def test_skin_tones_and_variants_stay_on_one_side_of_the_split() -> None:
    assert emoji.base_emoji("\U0001f44d\U0001f3fd") == "\U0001f44d"
    assert emoji.base_emoji("\u2764\ufe0f") == "\u2764"
    sides: dict[str, set[bool]] = {}
    for characters in DATA:
        sides.setdefault(emoji.base_emoji(characters), set()).add(emoji.in_validation(characters))
    assert all(len(side) == 1 for side in sides.values())
    share = sum(True in side for side in sides.values()) / len(sides)
    assert 0.07 < share < 0.13


def test_a_missing_font_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "_FONT_FOLDERS", ())
    answer = subprocess.CompletedProcess([], 0, stdout="/usr/share/fonts/other.ttf")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(FileNotFoundError, match="apt-get install fonts-noto-color-emoji"):
        emoji.find_font()


def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"language: expected one of en, .*, got 'xx'"):
        emoji.make_emoji_corpus(tmp_path / "out", language="xx")
    with pytest.raises(ValueError, match="size: expected 1 or more, got 0"):
        emoji.make_emoji_corpus(tmp_path / "out", size=0)
    with pytest.raises(ValueError, match="font: expected Noto Color Emoji, got"):
        emoji.make_emoji_corpus(tmp_path / "out", font=tmp_path / "none.ttf")
    monkeypatch.setattr(emoji.features, "check", lambda _: False)
    with pytest.raises(RuntimeError, match="RAQM"):
        emoji.make_emoji_corpus(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_single_glyphs_are_rendered(font: Path) -> None:
    loaded = ImageFont.truetype(str(font), 109, layout_engine=ImageFont.Layout.RAQM)
    for characters in NAMED:
        image = emoji.render(characters, loaded)
        assert image is not None
        assert image.std() > 20
        assert (image[:4] == 255).all()  # nothing is cut off at the edges
        assert (image[:, :4] == 255).all()
    assert emoji.render("\U0001f600\U0001f600", loaded) is None  # a sequence that does not join
    assert emoji.render("\U0001fbff", loaded) is None  # not in the font


def test_corpus(
    font: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {c: d for c, d in DATA.items() if zlib.crc32(c.encode()) % 64 == 0} | {c: DATA[c] for c in NAMED}
    monkeypatch.setattr(emoji.unicode_emoji, "EMOJI_DATA", chosen)
    counts = emoji.make_emoji_corpus(tmp_path / "out", size=24, language="de", font=font)
    assert f"{counts['train']} pairs to train on, {counts['val']} for validation" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    images, captions = set(), set()
    for split, count in counts.items():
        pairs = open_pairs(tmp_path / "out" / split)
        assert len(pairs) == count > 0
        assert pairs.skipped == []
        for i in range(count):
            image, caption = pairs[i]
            assert (image.shape, image.dtype) == ((24, 24, 3), np.uint8)
            images.add(image.tobytes())
            captions.add(caption)
    assert len(images) == sum(counts.values())
    assert {"grinsendes gesicht", "flagge deutschland", "rotes herz"} <= {caption.lower() for caption in captions}
