"""Filters and views: planted samples are found and named, good ones stay."""

import json
import pickle
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from helpers.tars import png

from dalle_fast.data import filter_pairs, open_pairs
from dalle_fast.data.dedup import ApproximateNeighbours
from dalle_fast.data.filter import REASONS, is_boilerplate, judge, words_in
from dalle_fast.data.filters import Filters
from dalle_fast.data.sources.view import Dropped, write_view


def write_folder(folder: Path, pairs: dict[str, tuple[bytes, str]]) -> Path:
    folder.mkdir()
    for name, (content, caption) in pairs.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text(caption)
    return folder


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("caption", "words"),
    [("a red circle", 3), ("", 0), ("IMG_1234", 1), ("12 34", 0), ("I am a T", 3), ("Zürich 1999", 1), ("猫がいる", 1)],
)
def test_words(caption: str, words: int) -> None:
    assert words_in(caption) == words


@pytest.mark.parametrize(
    "caption",
    [
        "photographed on 3 May 2015",
        "Photographed on 2015-05-03",
        "photo taken on May 3rd, 2015 at 10:32 am",
        "Picture taken 03/05/2015 10:32:11",
        "taken in 1999",
        "2015:05:03 10:32",
        "IMG_1234.jpg",
        "DSC01234.JPG",
        "dscf 0123",
        "P1030456",
        "GOPR0012.mp4",
        "holiday-pictures_17.png",
        "OLYMPUS DIGITAL CAMERA",
        "KODAK Digital Still Camera",
        "SONY DSC",
        "Exif_JPEG_PICTURE",
        "Uploaded with my iPhone",
        "Posted via Instagram",
        "Untitled",
        "File description not available",
        "© 2012 all rights reserved",
        "Paris, 14 July 2015",
    ],
)
def test_boilerplate_is_known(caption: str) -> None:
    assert is_boilerplate(caption, min_words=3)


@pytest.mark.parametrize(
    "caption",
    [
        "a red bicycle at the lake, photographed on 3 May 2015",
        "a woman who may take a photo in 2 hours",
        "an old Olympus camera on a wooden table",
        "the march of 1963 in Washington seen from above",
        "a picture of two dogs in the snow",
        "cat",
        "",
        "a sony radio from the seventies",
    ],
)
def test_captions_that_say_something_are_no_boilerplate(caption: str) -> None:
    assert not is_boilerplate(caption, min_words=3)


@pytest.mark.parametrize("caption", ["a" * 200_000, " " * 200_000, "1 " * 50_000, "photo " * 50_000, "p-" * 50_000])
def test_long_captions_take_no_long_time(caption: str) -> None:
    assert not is_boilerplate(caption, min_words=0)


def test_english_is_told_from_other_languages(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    english = [
        "a red bicycle leaning against a white wall",
        "two dogs playing in the snow near a frozen lake",
        "portrait of an old woman holding a cup of tea",
        "the skyline of the city at night with its lights reflected in the water",
        "children are running along the beach in summer",
    ]
    foreign = [
        "ein rotes Fahrrad lehnt an einer weißen Wand neben dem Haus",
        "deux chiens qui jouent dans la neige près du lac gelé",
        "retrato de una mujer anciana con una taza de té en la mano",
        "городской пейзаж ночью, огни отражаются на воде",
        "夏の海岸を走っている子供たちの写真",
    ]
    images = {f"{i}.png": (png(), caption) for i, caption in enumerate(english + foreign)}
    source = write_folder(tmp_path / "in", images)
    pairs = open_pairs(source)
    assert filter_pairs(tmp_path / "en", source, pairs, Filters(min_words=1)) == {"another language": 5}
    assert list(open_pairs(tmp_path / "en").captions()) == english
    assert filter_pairs(tmp_path / "all", source, pairs, Filters(language="none", min_words=1)) == {}
    assert filter_pairs(tmp_path / "de", source, pairs, Filters(1, language="de")) == {"another language": 9}


# ---------------------------------------------------------------------------------------------- filter

GOOD = "a red bicycle leaning against a white wall number {}"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Good pairs, and one for each reason to leave it out; the last caption six times."""
    pairs = {f"good{i}.png": (png(), GOOD.format("abcdefgh"[i] * 3)) for i in range(8)}
    pairs |= {
        "narrow.png": (png(size=(10, 21)), "a tall tower above the old town"),
        "just.png": (png(size=(10, 20)), "a tall tower above the new town"),
        "wide.jpg": (png(size=(201, 100), file_format="JPEG"), "the wide sea under a cloudy sky"),
        "icc.jpg": (png(size=(80, 60), file_format="JPEG", icc_profile=bytes(100_000)), "a small boat far out at sea"),
        "name.png": (png(), "IMG_1234.jpg"),
        "short.png": (png(), "red bicycle"),
        "torn.png": (png()[:20], "a picture whose file is torn apart"),
    }
    pairs |= {f"same{i}.png": (png(), ("A  walk in the PARK", "a walk in the park")[i % 2]) for i in range(6)}
    return write_folder(tmp_path / "mixed", pairs)


COUNTS = {
    "aspect ratio": 2, "boilerplate": 1, "caption too short": 1, "broken image": 1, "repeated caption": 6,
}  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_filter(workers: int, mixed: Path, tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    counts = filter_pairs(tmp_path / "kept", mixed, open_pairs(mixed), Filters(max_repeats=5), workers, chunk_size=4)
    assert counts == COUNTS
    dropped = {line["name"]: line for line in lines_of(tmp_path / "kept" / "dropped.jsonl")}
    assert {name: line["reason"] for name, line in dropped.items()} == {
        "narrow.png": "aspect ratio",
        "wide.jpg": "aspect ratio",
        "name.png": "boilerplate",
        "short.png": "caption too short",
        "torn.png": "broken image",
        **{f"same{i}.png": "repeated caption" for i in range(6)},
    }
    assert dropped["name.png"]["caption"] == "IMG_1234.jpg"
    assert dropped["torn.png"]["error"] == "OSError: Truncated File Read"
    view = json.loads((tmp_path / "kept" / "view.json").read_text())
    assert (view["pairs"], view["kept"], view["dropped"]) == (21, 10, counts)
    assert view["settings"]["filter"]["max_repeats"] == 5
    kept = open_pairs(tmp_path / "kept")
    assert [kept.name(i) for i in range(10)] == sorted([f"good{i}.png" for i in range(8)] + ["just.png", "icc.jpg"])
    all_pairs = open_pairs(mixed)
    assert filter_pairs(tmp_path / "more", mixed, all_pairs, Filters(max_repeats=6)) == {
        reason: count for reason, count in COUNTS.items() if reason != "repeated caption"
    }


def test_filter_command(cli: ModuleType, mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args = ["data", "filter", "--data", str(mixed), "--out", str(tmp_path / "kept"), "--max-repeats", "5"]
    assert cli.main([*args, "--min-words", "2", "--language", "none"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'kept'}: 11 of 21 pairs kept",
        "           6  repeated caption",
        "           2  aspect ratio",
        "           1  boilerplate",
        "           1  broken image",
    ]
    assert cli.main(args) == 2
    assert "output folder: expected a new or empty one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_words": -1}, "min_words: expected 0 or more, got -1"),
        ({"max_repeats": 0}, "max_repeats: expected 1 or more, got 0"),
        ({"max_aspect": 0.5}, "max_aspect: expected 1 or more, got 0.5"),
        ({"max_aspect": float("nan")}, "max_aspect: expected 1 or more, got nan"),
        ({"language": "xx"}, "language: expected one of ar, .*zh or none, got 'xx'"),
    ],
)
def test_bad_filters(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Filters(**options)


def test_a_filter_that_keeps_nothing(mixed: Path, tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    with pytest.raises(ValueError, match=r"pairs: expected some to keep of .*, got none: {.*'caption too short': 20"):
        filter_pairs(tmp_path / "kept", mixed, open_pairs(mixed), Filters(min_words=50))
    with pytest.raises(ValueError, match="workers: expected 0 or more, got -1"):
        filter_pairs(tmp_path / "kept", mixed, open_pairs(mixed), Filters(), workers=-1)
    assert not (tmp_path / "kept").exists()


def test_a_missing_package_is_named(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ImportError, match="pip install py3langid, or --language none"):
        filter_pairs(tmp_path / "kept", mixed, open_pairs(mixed), Filters())
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(ImportError, match="pip install usearch"):
        ApproximateNeighbours()


# ---------------------------------------------------------------------------------------------- views


def test_views_of_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view has the pairs of its source, of any kind, and can be opened from any folder."""
    images = {f"{i}.png": (png(size=(8 + i, 9)), f"caption {i}") for i in range(6)}
    folder = write_folder(tmp_path / "folder", images)
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for file in sorted(folder.iterdir()):
            tar.add(file, file.name)
    rows = [{"image": f"folder/{i}.png", "caption": f"caption {i}"} for i in range(6)]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    for number, source in enumerate(("folder", "shard.tar", "list.jsonl", "*.tar")):
        pairs = open_pairs(source)
        out = tmp_path / "views" / f"view{number}"
        assert write_view(out, source, pairs, [Dropped(1, "red", {}), Dropped(4, "blue", {"why": 1})], {}) == {
            "red": 1, "blue": 1,
        }  # fmt: skip
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(out)
            view = open_pairs(out)
        assert len(view) == 4
        for place, i in enumerate((0, 2, 3, 5)):
            assert np.array_equal(view[place].image, pairs[i].image)
            assert view[place].caption == view.caption(place) == f"caption {i}"
            assert view.name(place) == pairs.name(i)
            assert view.image_size(place) == pairs.image_size(i) == (8 + i, 9)
        assert list(view.captions()) == [f"caption {i}" for i in (0, 2, 3, 5)]
        assert np.array_equal(pickle.loads(pickle.dumps(view))[3].image, pairs[5].image)
        with pytest.raises(IndexError, match="index: expected 0 to 3, got -1"):
            view[-1]
        write_view(tmp_path / "views" / f"narrower{number}", out, view, [Dropped(0, "first", {})], {})
        assert list(open_pairs(tmp_path / "views" / f"narrower{number}").captions()) == [
            f"caption {i}" for i in (2, 3, 5)
        ]
    scenes = open_pairs("scenes")
    write_view(tmp_path / "scenes", "scenes", scenes, [Dropped(0, "first", {})], {})
    assert np.array_equal(open_pairs(tmp_path / "scenes")[0].image, scenes[1].image)
    assert open_pairs(tmp_path / "scenes").image_size(0) == (32, 32)


def test_views_of_a_changed_source_are_refused(tmp_path: Path) -> None:
    images = {f"{i}.png": (png(), f"caption {i}") for i in range(6)}
    source = write_folder(tmp_path / "folder", images)
    write_view(tmp_path / "view", source, open_pairs(source), [Dropped(1, "red", {})], {})
    for change in (
        lambda: (source / "3.txt").write_text("another caption"),
        lambda: ((source / "3.txt").write_text("caption 3"), (source / "5.txt").unlink()),
    ):
        change()
        with pytest.raises(
            ValueError, match=r"view: expected the pairs that .*view was made of, got others in .*folder"
        ):
            open_pairs(tmp_path / "view")
    (source / "5.txt").write_text("caption 5")
    assert len(open_pairs(tmp_path / "view")) == 5
    kept = (tmp_path / "view" / "kept.npy").read_bytes()
    for content in (kept[:-8], b"", np.lib.format.magic(1, 0)):
        (tmp_path / "view" / "kept.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"view: expected view\.json and kept\.npy in"):
            open_pairs(tmp_path / "view")
    for content in ("[]", "{}", '{"format": "another"}'):
        (tmp_path / "view" / "view.json").write_text(content)
        with pytest.raises(ValueError, match=r"view: expected view\.json and kept\.npy in"):
            open_pairs(tmp_path / "view")


def test_a_source_that_changes_while_it_is_filtered(tmp_path: Path) -> None:
    """Its pairs are broken, by name; and it is not the source that it was."""
    folder = write_folder(tmp_path / "in", {f"{i}.png": (png(), f"a caption number {i}") for i in range(4)})
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for file in sorted(folder.iterdir()):
                tar.add(file, name + file.name)
    pairs = open_pairs(tmp_path)
    (tmp_path / "b.tar").write_bytes(b"")
    reasons, _ = judge(pairs, Filters(language="none"), range(8))
    assert [REASONS[reason] for reason in reasons] == 4 * ["kept"] + 4 * ["broken image"]
    with pytest.raises(ValueError, match=r"pairs: expected them as they were when they were opened, got b\.tar: "):
        filter_pairs(tmp_path / "kept", tmp_path, pairs, Filters(language="none"))


@pytest.fixture
def view(tmp_path: Path) -> Path:
    source = write_folder(tmp_path / "source", {f"{i}.png": (png(), f"caption {i}") for i in range(6)})
    write_view(tmp_path / "view", source, open_pairs(source), [Dropped(1, "red", {})], {})
    return tmp_path / "view"


def test_every_changed_byte_of_the_indices_is_noticed(view: Path) -> None:
    whole = (view / "kept.npy").read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        (view / "kept.npy").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"kept\.npy: expected it as it was written, got other bytes"):
            open_pairs(view)


@pytest.mark.parametrize(
    "kept", [[0, 2, 1, 4, 5], [0, 1, 1, 2, 3], [-1, 0, 1, 2, 3], [0, 1, 2, 3, 6], [0, 1, 2, 3, 2**62]]
)
def test_views_without_a_checksum_open_with_indices_that_fit(view: Path, kept: list[int]) -> None:
    content = json.loads((view / "view.json").read_text())
    del content["kept_crc"]
    (view / "view.json").write_text(json.dumps(content))
    assert len(open_pairs(view)) == 5
    np.save(view / "kept.npy", np.array(kept))
    with pytest.raises(ValueError, match=r"view: expected .*indices .*kept\.npy"):
        open_pairs(view)
    np.save(view / "kept.npy", np.array(kept, np.float64))
    with pytest.raises(ValueError, match="expected 5 indices, got float64"):
        open_pairs(view)


def test_a_view_of_itself_is_an_error(view: Path, tmp_path: Path) -> None:
    write_view(tmp_path / "outer", view, open_pairs(view), [], {})
    (tmp_path / "alias").symlink_to(tmp_path / "outer")
    content = json.loads((view / "view.json").read_text())
    for source in ("view", "outer", "alias"):
        (view / "view.json").write_text(json.dumps({**content, "source": str(tmp_path / source)}))
        for opened in ("view", "outer", "alias"):
            with pytest.raises(ValueError, match="view: expected a view of a source, got a view of itself in"):
                open_pairs(tmp_path / opened)


@pytest.mark.parametrize(
    "change", [{"source": 3}, {"source": None}, {"fingerprint": []}, {"kept": "5"}, {"format": []}]
)
def test_other_types_in_a_view_are_named(view: Path, change: dict) -> None:
    content = json.loads((view / "view.json").read_text())
    for text in (json.dumps({**content, **change}), "[" * 200_000, '{"a":' * 200_000):
        (view / "view.json").write_text(text)
        with pytest.raises(ValueError, match=r"view: expected view\.json and kept\.npy in"):
            open_pairs(view)


def test_all_captions_of_an_image_must_pass(tmp_path: Path) -> None:
    good, bad = "a red bicycle leaning against a white wall", "IMG_1234.jpg"
    captions = {"a.png": f"{good}\n{good} again", "b.png": f"{good}\n{bad}", "c.png": good}
    source = write_folder(tmp_path / "in", {name: (png(), caption) for name, caption in captions.items()})
    assert filter_pairs(tmp_path / "out", source, open_pairs(source), Filters(language="none")) == {"boilerplate": 1}
    kept = open_pairs(tmp_path / "out")
    assert [kept.name(i) for i in range(len(kept))] == ["a.png", "c.png"]
