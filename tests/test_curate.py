"""Filters, views and near-duplicates: what is planted is found and named, what is good stays."""

import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_fast import cli
from dalle_fast.config import Filters
from dalle_fast.data import drop_duplicates, embed_pairs, filter_pairs, open_pairs
from dalle_fast.data.curate import REASONS, _judge, is_boilerplate, words_in
from dalle_fast.data.duplicates import ApproximateNeighbours, ExactNeighbours, find_duplicates
from dalle_fast.data.scenes import SceneCorpus
from dalle_fast.data.views import Dropped, write_view
from dalle_fast.pipeline import find_system, load_clip

THRESHOLD = 0.98  # of the shipped CLIP


def picture(width: int = 8, height: int = 8, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, file_format, **options)
    return buffer.getvalue()


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
    images = {f"{i}.png": (picture(), caption) for i, caption in enumerate(english + foreign)}
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
    pairs = {f"good{i}.png": (picture(), GOOD.format("abcdefgh"[i] * 3)) for i in range(8)}
    pairs |= {
        "narrow.png": (picture(10, 21), "a tall tower above the old town"),
        "just.png": (picture(10, 20), "a tall tower above the new town"),
        "wide.jpg": (picture(201, 100, "JPEG"), "the wide sea under a cloudy sky"),
        "icc.jpg": (picture(80, 60, "JPEG", icc_profile=bytes(100_000)), "a small boat far out at sea"),
        "name.png": (picture(), "IMG_1234.jpg"),
        "short.png": (picture(), "red bicycle"),
        "torn.png": (picture()[:20], "a picture whose file is torn apart"),
    }
    pairs |= {f"same{i}.png": (picture(), ("A  walk in the PARK", "a walk in the park")[i % 2]) for i in range(6)}
    return write_folder(tmp_path / "mixed", pairs)


COUNTS = {
    "aspect ratio": 2, "boilerplate": 1, "caption too short": 1, "broken image": 1, "repeated caption": 6,
}  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_filter(workers: int, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_fast.data.curate._CHUNK", 4)
    counts = filter_pairs(tmp_path / "kept", mixed, open_pairs(mixed), Filters(max_repeats=5), workers)
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
    view = json.loads((tmp_path / "kept" / "view.json").read_text())
    assert (view["pairs"], view["kept"], view["dropped"]) == (21, 10, counts)
    assert view["settings"]["filter"]["max_repeats"] == 5
    kept = open_pairs(tmp_path / "kept")
    assert [kept.name(i) for i in range(10)] == sorted([f"good{i}.png" for i in range(8)] + ["just.png", "icc.jpg"])
    all_pairs = open_pairs(mixed)
    assert filter_pairs(tmp_path / "more", mixed, all_pairs, Filters(max_repeats=6)) == {
        reason: count for reason, count in COUNTS.items() if reason != "repeated caption"
    }


def test_filter_command(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
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
    """A view shows what its source does, whatever the source is, and from wherever it is opened."""
    images = {f"{i}.png": (picture(8 + i, 9), f"caption {i}") for i in range(6)}
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
    write_view(tmp_path / "drawn", "scenes", scenes, [Dropped(0, "first", {})], {})
    assert np.array_equal(open_pairs(tmp_path / "drawn")[0].image, scenes[1].image)
    assert open_pairs(tmp_path / "drawn").image_size(0) == (32, 32)


def test_views_of_a_changed_source_are_refused(tmp_path: Path) -> None:
    images = {f"{i}.png": (picture(), f"caption {i}") for i in range(6)}
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
    folder = write_folder(tmp_path / "in", {f"{i}.png": (picture(), f"a caption number {i}") for i in range(4)})
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for file in sorted(folder.iterdir()):
                tar.add(file, name + file.name)
    pairs = open_pairs(tmp_path)
    (tmp_path / "b.tar").write_bytes(b"")
    reasons, _ = _judge(pairs, Filters(language="none"), range(8))
    assert [REASONS[reason] for reason in reasons] == 4 * ["kept"] + 4 * ["broken image"]
    with pytest.raises(ValueError, match=r"pairs: expected them as they were when they were opened, got b\.tar: "):
        filter_pairs(tmp_path / "kept", tmp_path, pairs, Filters(language="none"))


# ---------------------------------------------------------------------------------------------- near-duplicates


def planted(n: int = 90, dimensions: int = 32) -> tuple[torch.Tensor, dict[int, int]]:
    """Unit vectors of which some are near an earlier one, and which: row -> row."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(n, dimensions, generator=generator)
    duplicates = {row: int(torch.randint(row // 7 * 5, (1,), generator=generator)) // 7 * 7 for row in range(13, n, 7)}
    for row, of in duplicates.items():
        vectors[row] = vectors[of] + 0.02 * torch.randn(dimensions, generator=generator)
    return torch.nn.functional.normalize(vectors, dim=1), duplicates


def blocks(vectors: torch.Tensor, size: int) -> list[tuple[np.ndarray, torch.Tensor]]:
    return list(
        zip(np.array_split(np.arange(len(vectors)), range(size, len(vectors), size)), vectors.split(size), strict=True)
    )


@pytest.mark.parametrize("size", [1, 8, 90])
@pytest.mark.parametrize("neighbours", [lambda: ExactNeighbours(90), ApproximateNeighbours])
def test_planted_vectors_are_found(size: int, neighbours, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_fast.data.duplicates._BLOCK", 16)
    vectors, duplicates = planted()
    found = list(find_duplicates(blocks(vectors, size), 0.95, neighbours()))
    assert {row: of for row, of, _ in found} == duplicates
    for row, of, cosine in found:
        assert cosine == pytest.approx(float(vectors[row] @ vectors[of]), abs=2e-3)


def test_what_stays_is_apart_and_what_goes_is_near_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a circle, where likeness forms chains, against the definition; not all of a chain goes."""
    monkeypatch.setattr("dalle_fast.data.duplicates._BLOCK", 16)
    angles = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 * torch.pi
    vectors = torch.stack([angles.cos(), angles.sin()], 1).float()
    kept: list[int] = []
    for row in range(200):
        if not kept or (vectors[row] @ vectors[kept].T).max() < 0.99:
            kept.append(row)
    found = list(find_duplicates(blocks(vectors, 50), 0.99, ExactNeighbours(200)))
    assert sorted({*range(200)} - {row for row, _, _ in found}) == kept
    assert len(kept) > 20
    for row, of, cosine in found:
        assert of in kept and of < row and cosine >= 0.99


def test_approximate_agrees_with_exact() -> None:
    """On 3,000 vectors with 300 near-duplicates: usearch's threads build another graph each time, and miss a few."""
    generator = torch.Generator().manual_seed(2)
    vectors = torch.randn(3000, 64, generator=generator)
    rows = torch.randperm(2999, generator=generator)[:300] + 1
    for row in rows.tolist():
        vectors[row] = vectors[int(torch.randint(row, (1,), generator=generator))] + 0.05 * torch.randn(
            64, generator=generator
        )
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    exact = {row for row, _, _ in find_duplicates(blocks(vectors, 500), 0.98, ExactNeighbours(3000))}
    approximate = {row for row, _, _ in find_duplicates(blocks(vectors, 500), 0.98, ApproximateNeighbours())}
    assert len(exact) > 250
    assert len(approximate ^ exact) <= 0.02 * len(exact)


def variants(image: np.ndarray) -> list[np.ndarray]:
    """A picture as it comes around: compressed, smaller, larger, with a pixel cut off on every side."""
    whole, buffer = Image.fromarray(image), io.BytesIO()
    whole.save(buffer, "JPEG", quality=75)
    size = whole.size[0]
    smaller = whole.resize((3 * size // 4, 3 * size // 4), Image.Resampling.LANCZOS)
    larger = whole.resize((2 * size, 2 * size), Image.Resampling.BICUBIC)
    return [np.array(p) for p in (Image.open(buffer), smaller, larger, whole.crop((1, 1, size - 1, size - 1)))]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty scenes that differ, 64 x 64, each followed later by four near-duplicates; and a torn file."""
    corpus, seen, scenes = SceneCorpus(100, size=64), set(), []
    for i in range(len(corpus)):
        scene = corpus.scene(i)
        items = frozenset((scene.first, scene.second))
        if scene.second and items not in seen and len(scenes) < 40:
            seen.add(items)
            scenes.append(corpus[i])
    folder = tmp_path_factory.mktemp("pictures")
    for i, (image, caption) in enumerate(scenes):
        for copy, pixels in enumerate([image, *variants(image)]):
            Image.fromarray(pixels).save(folder / f"{copy}-{i:02}.png")
            (folder / f"{copy}-{i:02}.txt").write_text(caption)
    (folder / "2-50.png").write_bytes(b"torn")
    (folder / "2-50.txt").write_text("torn")
    return folder


@pytest.fixture(scope="module")
def embedded(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    clip = load_clip(find_system("tiny")).requires_grad_(False)
    folder = tmp_path_factory.mktemp("embedded") / "all"
    assert embed_pairs(folder, open_pairs(pictures), clip.encode_image, 32, "tiny", shard_size=64)
    return folder


@pytest.mark.parametrize("exact_up_to", [201, 200])
def test_near_duplicate_images_are_found_and_no_others(
    exact_up_to: int, pictures: Path, embedded: Path, tmp_path: Path
) -> None:
    """By the shipped CLIP at a cosine of 0.98: all 160, none of the 40 that are distinct."""
    pairs = open_pairs(pictures)
    counts = drop_duplicates(tmp_path / "unique", pictures, pairs, embedded, THRESHOLD, exact_up_to)
    assert counts == {"near-duplicate": 160, "broken image": 1}
    unique = open_pairs(tmp_path / "unique")
    assert [unique.name(i) for i in range(len(unique))] == [f"0-{i:02}.png" for i in range(40)]
    for line in lines_of(tmp_path / "unique" / "dropped.jsonl"):
        if line["reason"] == "broken image":
            assert line["name"] == "2-50.png" and line["error"].startswith("UnidentifiedImageError")
        else:
            assert line["of_name"] == "0" + line["name"][1:] == pairs.name(line["of"])
            assert THRESHOLD <= line["cosine"] <= 1
    settings = json.loads((tmp_path / "unique" / "view.json").read_text())["settings"]["dedup"]
    assert (settings["threshold"], settings["exact"]) == (THRESHOLD, exact_up_to == 201)


def test_dedup_command(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """On a filtered source; in two steps, by two processes, and once more."""
    narrowed, unique = tmp_path / "narrowed", tmp_path / "unique"
    assert cli.main(["data", "filter", "--data", str(pictures), "--out", str(narrowed), "--max-repeats", "100"]) == 0
    assert "200 of 201 pairs kept" in capsys.readouterr().out
    args = ["data", "dedup", "--data", str(narrowed), "--out", str(unique)]
    assert cli.main(args) == 0
    assert f"{unique}: 40 of 200 pairs kept\n         160  near-duplicate\n" in capsys.readouterr().out
    assert len(open_pairs(unique)) == 40
    assert (tmp_path / "unique.embeddings" / "shard-00000" / "embeddings.npy").is_file()
    again = [*args[:-1], str(tmp_path / "again"), "--embeddings", str(tmp_path / "unique.embeddings")]
    assert cli.main([*again, "--threshold", "1.5"]) == 2
    assert "threshold: expected a cosine above 0 and up to 1, got 1.5" in capsys.readouterr().err
    assert cli.main([*again, "--threshold", "0.99999"]) == 0
    assert len(open_pairs(tmp_path / "again")) > 100


def test_processes_share_the_embedding(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = ["data", "dedup", "--data", str(pictures), "--out", str(tmp_path / "unique")]
    for rank, said in (("1", "this process has done its part"), ("0", "40 of 201 pairs kept")):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(args) == 0
        assert said in capsys.readouterr().out


def test_embeddings_of_others_are_refused(pictures: Path, embedded: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="embeddings: expected those of scenes, got those of another source in"):
        drop_duplicates(tmp_path / "unique", "scenes", open_pairs("scenes"), embedded, THRESHOLD)
    pairs = open_pairs(pictures)
    with pytest.raises(ValueError, match="embeddings: expected those of 201 images, got none or a part in"):
        drop_duplicates(tmp_path / "unique", pictures, pairs, tmp_path / "none", THRESHOLD)
    clip = load_clip(find_system("tiny"))
    with pytest.raises(ValueError, match=r"fingerprint: expected tiny, with which .* was begun, got large"):
        embed_pairs(embedded, pairs, clip.encode_image, 32, "large", shard_size=64)
