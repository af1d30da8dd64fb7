"""Near-duplicate images: planted ones are found, exactly and approximately, and no others."""

import io
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.tars import png
from PIL import Image

from dalle_fast.data import Embedding, drop_duplicates, embed_pairs, open_pairs
from dalle_fast.data.dedup import ApproximateNeighbours, ExactNeighbours, find_duplicates
from dalle_fast.data.sources.scenes import SceneCorpus
from dalle_fast.pipeline import find_system, load_clip

THRESHOLD = 0.98  # of the shipped CLIP


def embedding(fingerprint: str = "tiny") -> Embedding:
    return Embedding(fingerprint=fingerprint, image_size=32, shard_size=64)


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
@pytest.mark.parametrize("neighbours", [lambda: ExactNeighbours(90, block_size=16), ApproximateNeighbours])
def test_planted_vectors_are_found(size: int, neighbours) -> None:
    if neighbours is ApproximateNeighbours:
        pytest.importorskip("usearch")
    vectors, duplicates = planted()
    found = list(find_duplicates(blocks(vectors, size), 0.95, neighbours(), block_size=16))
    assert {row: of for row, of, _ in found} == duplicates
    for row, of, cosine in found:
        assert cosine == pytest.approx(float(vectors[row] @ vectors[of]), abs=2e-3)


def test_what_stays_is_apart_and_what_goes_is_near_it() -> None:
    """On a circle, where likeness forms chains, against the definition; not all of a chain goes."""
    angles = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 * torch.pi
    vectors = torch.stack([angles.cos(), angles.sin()], 1).float()
    kept: list[int] = []
    for row in range(200):
        if not kept or (vectors[row] @ vectors[kept].T).max() < 0.99:
            kept.append(row)
    found = list(find_duplicates(blocks(vectors, 50), 0.99, ExactNeighbours(200, block_size=16), block_size=16))
    assert sorted({*range(200)} - {row for row, _, _ in found}) == kept
    assert len(kept) > 20
    for row, of, cosine in found:
        assert of in kept and of < row and cosine >= 0.99


def test_approximate_agrees_with_exact() -> None:
    """On 3,000 vectors with 300 near-duplicates: usearch's threads build another graph each time, and miss a few."""
    pytest.importorskip("usearch")
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
    """An image as it comes around: compressed, smaller, larger, with a pixel cut off on every side."""
    whole, buffer = Image.fromarray(image), io.BytesIO()
    whole.save(buffer, "JPEG", quality=75)
    size = whole.size[0]
    smaller = whole.resize((3 * size // 4, 3 * size // 4), Image.Resampling.LANCZOS)
    larger = whole.resize((2 * size, 2 * size), Image.Resampling.BICUBIC)
    return [np.array(p) for p in (Image.open(buffer), smaller, larger, whole.crop((1, 1, size - 1, size - 1)))]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty scenes that differ, 64 x 64, each followed later by four near-duplicates; and a torn file."""
    corpus, seen, scenes = SceneCorpus(100, size=64), set(), []
    for i in range(len(corpus)):
        scene = corpus.scene(i)
        items = frozenset((scene.first, scene.second))
        if scene.second and items not in seen and len(scenes) < 40:
            seen.add(items)
            scenes.append(corpus[i])
    folder = tmp_path_factory.mktemp("images")
    for i, (image, caption) in enumerate(scenes):
        for copy, pixels in enumerate([image, *variants(image)]):
            Image.fromarray(pixels).save(folder / f"{copy}-{i:02}.png")
            (folder / f"{copy}-{i:02}.txt").write_text(caption)
    (folder / "2-50.png").write_bytes(b"torn")
    (folder / "2-50.txt").write_text("torn")
    return folder


@pytest.fixture(scope="module")
def embedded(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    clip = load_clip(find_system("tiny")).requires_grad_(False)
    folder = tmp_path_factory.mktemp("embedded") / "all"
    assert embed_pairs(folder, open_pairs(images), clip.encode_image, embedding())
    return folder


@pytest.mark.parametrize("exact_up_to", [201, 200])
def test_near_duplicate_images_are_found_and_no_others(
    exact_up_to: int, images: Path, embedded: Path, tmp_path: Path
) -> None:
    """By the shipped CLIP at a cosine of 0.98: all 160, none of the 40 that are distinct."""
    if exact_up_to < 201:
        pytest.importorskip("usearch")
    pairs = open_pairs(images)
    counts = drop_duplicates(tmp_path / "unique", images, pairs, embedded, THRESHOLD, exact_up_to)
    assert counts == {"near-duplicate": 160, "broken image": 1}
    unique = open_pairs(tmp_path / "unique")
    assert [unique.name(i) for i in range(len(unique))] == [f"0-{i:02}.png" for i in range(40)]
    for line in map(json.loads, (tmp_path / "unique" / "dropped.jsonl").read_text().splitlines()):
        if line["reason"] == "broken image":
            assert line["name"] == "2-50.png" and line["error"].startswith("UnidentifiedImageError")
        else:
            assert line["of_name"] == "0" + line["name"][1:] == pairs.name(line["of"])
            assert THRESHOLD <= line["cosine"] <= 1
    settings = json.loads((tmp_path / "unique" / "view.json").read_text())["settings"]["dedup"]
    assert (settings["threshold"], settings["exact"]) == (THRESHOLD, exact_up_to == 201)


def test_dedup_command(cli: ModuleType, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """On a filtered source; in two steps, by two processes, and once more."""
    narrowed, unique = tmp_path / "narrowed", tmp_path / "unique"
    assert cli.main(["data", "filter", "--data", str(images), "--out", str(narrowed), "--max-repeats", "100"]) == 0
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
    cli: ModuleType, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = ["data", "dedup", "--data", str(images), "--out", str(tmp_path / "unique")]
    for rank, said in (("1", "this process has done its part"), ("0", "40 of 201 pairs kept")):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(args) == 0
        assert said in capsys.readouterr().out


def test_embeddings_of_others_are_refused(images: Path, embedded: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="embeddings: expected those of scenes, got those of another source in"):
        drop_duplicates(tmp_path / "unique", "scenes", open_pairs("scenes"), embedded, THRESHOLD)
    pairs = open_pairs(images)
    with pytest.raises(ValueError, match="embeddings: expected those of 201 images, got none or a part in"):
        drop_duplicates(tmp_path / "unique", images, pairs, tmp_path / "none", THRESHOLD)
    clip = load_clip(find_system("tiny"))
    with pytest.raises(ValueError, match=r"fingerprint: expected tiny, with which .* was begun, got large"):
        embed_pairs(embedded, pairs, clip.encode_image, embedding("large"))


def test_damaged_embeddings_are_named_and_never_used(images: Path, embedded: Path, tmp_path: Path) -> None:
    """Any byte of a shard; older shards without checksums too, where the damage leaves no valid values."""
    pairs, folder = open_pairs(images), tmp_path / "embedded"
    shutil.copytree(embedded, folder)
    rng = np.random.default_rng(0)
    shard = folder / "shard-00001"
    for name in ("rows.npy", "embeddings.npy"):
        whole = (shard / name).read_bytes()
        for place in rng.integers(0, len(whole), 20):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(8))
            (shard / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"embeddings: expected .*shard-00001 as it was.*{name}.*delete this"):
                drop_duplicates(tmp_path / "unique", images, pairs, folder, THRESHOLD)
        (shard / name).write_bytes(whole)
    whole_checksums = (shard / "checksums.json").read_text()
    for content in ("", "[]", "{}", "[" * 100_000, whole_checksums.replace("rows", "row")):
        (shard / "checksums.json").write_text(content)
        with pytest.raises(ValueError, match=r"embeddings: expected .*shard-00001 as it was"):
            drop_duplicates(tmp_path / "unique", images, pairs, folder, THRESHOLD)
    (shard / "checksums.json").unlink()
    rows = np.load(shard / "rows.npy")
    for values in (rows + 64, rows[::-1], rows[:-1], rows.astype(np.float64), rows - 200):
        np.save(shard / "rows.npy", values)
        with pytest.raises(ValueError, match=r"embeddings: expected .*shard-00001 as it was"):
            drop_duplicates(tmp_path / "unique", images, pairs, folder, THRESHOLD)
    np.save(shard / "rows.npy", rows)
    assert drop_duplicates(tmp_path / "unique", images, pairs, folder, THRESHOLD)["near-duplicate"] == 160


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pairs": 1000000000000, "shard_size": 64}', "[" * 100_000])
def test_damaged_settings_of_embeddings_are_named(images: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "embedded").mkdir()
    (tmp_path / "embedded" / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"(settings|embeddings): expected"):
        drop_duplicates(tmp_path / "unique", images, open_pairs(images), tmp_path / "embedded", THRESHOLD)


def test_embeddings_of_a_shard_of_broken_images(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("torn")
        (tmp_path / f"{i}.png").write_bytes(b"torn" if i < 2 else png())
    pairs = open_pairs(tmp_path)
    settings = Embedding(fingerprint="x", image_size=4, shard_size=2)
    assert embed_pairs(tmp_path / "e", pairs, lambda images: images.flatten(1), settings)
    assert drop_duplicates(tmp_path / "u", tmp_path, pairs, tmp_path / "e", 0.9) == {
        "broken image": 2,
        "near-duplicate": 1,
    }
