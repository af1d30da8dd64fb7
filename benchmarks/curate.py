"""How fast data is filtered, rid of near-duplicates, encoded, and read back: ``python benchmarks/curate.py``.

One line a measurement, on what this machine has. Everything is made in a temporary folder of 0.5 GB.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dalle_fast.data import Batches, EncodedPairs, embed_pairs, encode_pairs, filter_pairs, open_pairs
from dalle_fast.data.dedup import ApproximateNeighbours, ExactNeighbours, Neighbours, find_duplicates
from dalle_fast.data.filters import Filters
from dalle_fast.data.sources.scenes import SceneCorpus
from dalle_fast.pipeline import find_system, load_clip, load_dvae

PAIRS = 20_000


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def write_shard(path: Path) -> None:
    """Scenes' captions, each with a number's worth of difference, and one 256 x 256 JPEG."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((256, 256)).save(buffer, "JPEG")
    corpus = SceneCorpus(PAIRS)
    with tarfile.open(path, "w") as tar:
        for i, caption in enumerate(corpus.captions()):
            for extension, content in (("jpg", buffer.getvalue()), ("txt", f"{caption} number {i}".encode())):
                info = tarfile.TarInfo(f"{i:06}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def measure_filter(folder: Path) -> None:
    write_shard(folder / "shard.tar")
    pairs = open_pairs(folder / "shard.tar")
    for language in ("en", "none"):
        for workers in (0, 2):
            out = folder / f"{language}{workers}"
            filters = Filters(language=language)
            dropped, seconds = timed(lambda: filter_pairs(out, folder / "shard.tar", pairs, filters, workers))  # noqa: B023
            left = PAIRS - sum(dropped.values())
            print(f"filter, language {language}, {workers} workers: {PAIRS / seconds:,.0f} pairs/s, {left:,} kept")


def measure_models(folder: Path) -> None:
    system, corpus = find_system("tiny"), SceneCorpus(4_096)
    _, drawing = timed(lambda: [corpus[i] for i in range(len(corpus))])
    print(f"drawing the scenes that follow takes {drawing:.1f} s of each")
    dvae, clip = load_dvae(system), load_clip(system).requires_grad_(False)
    size, grid = dvae.cfg.image_size, (dvae.cfg.grid, dvae.cfg.grid)
    for draws in (1, 4):
        out = folder / f"codes{draws}"
        _, seconds = timed(lambda: encode_pairs(out, corpus, dvae.encode, size, grid, "tiny", draws=draws))  # noqa: B023
        print(f"encode, {draws} draws: {len(corpus) * draws / seconds:,.0f} images/s")
    _, seconds = timed(lambda: embed_pairs(folder / "embeddings", corpus, clip.encode_image, 32, "tiny"))
    print(f"dedup, embedding: {len(corpus) / seconds:,.0f} images/s")


def measure_search(count: int, dimensions: int) -> None:
    """Random vectors, of which a tenth resembles an earlier one at a cosine of about 0.98."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(count, dimensions, generator=generator), dim=1)
    rows = torch.randperm(count - 1, generator=generator)[: count // 10].sort().values + 1
    noise = torch.nn.functional.normalize(torch.randn(len(rows), dimensions, generator=generator), dim=1)
    for row, difference in zip(rows.tolist(), noise, strict=True):
        vectors[row] = vectors[int(torch.randint(row, (1,), generator=generator))] + 0.2 * difference
    vectors = torch.nn.functional.normalize(vectors, dim=1)
    found: list[set[int]] = []
    searches: dict[str, Neighbours] = {"exact": ExactNeighbours(count), "usearch": ApproximateNeighbours()}
    for name, neighbours in searches.items():
        blocks = [(np.arange(count), vectors)]
        duplicates, seconds = timed(lambda: list(find_duplicates(blocks, 0.95, neighbours)))  # noqa: B023
        found.append({row for row, _, _ in duplicates})
        print(f"dedup, {name}: {count:,} x {dimensions} in {seconds:.1f} s, {len(found[-1]):,} near-duplicates")
    print(f"dedup: usearch finds {len(found[0] & found[1]) / len(found[0]):.2%} of the exact ones", end="")
    print(f", and {len(found[1] - found[0])} others")


def measure_reading(folder: Path) -> None:
    """Codes 32 x 32 in 2 draws, read in random order from the page cache."""
    count, reads = 8_192, 100_000
    codes = torch.randint(8192, (64, 32, 32), generator=torch.Generator().manual_seed(0))
    encoded = encode_pairs(folder / "read", SceneCorpus(count), lambda images: codes, 8, (32, 32), "none", draws=2)
    assert encoded
    _, seconds = timed(lambda: EncodedPairs(folder / "read"))
    print(f"encoded pairs: opened in {1000 * seconds:.1f} ms")
    order = np.random.default_rng(0).integers(count, size=reads).tolist()
    _, seconds = timed(lambda: [encoded.draw(i, 0) and None for i in order])
    print(f"encoded pairs: {reads / seconds:,.0f} reads/s, {reads * 2048 / seconds / 1e6:,.0f} MB/s, one thread")
    stored = torch.randint(8192, (count, 32, 32)).to(torch.int16).numpy().view(np.uint16)
    _, seconds = timed(lambda: [stored[i].astype(np.int64) is None for i in order])
    print(f"the same codes from an array in memory, unchecked, no captions: {reads / seconds:,.0f} reads/s")
    batches = Batches(encoded, 1024, lambda pair, _: pair._asdict(), seed=0)
    _, seconds = timed(lambda: [batches.batch_at(step) and None for step in range(30)])
    print(f"batches of 1,024 of them: {30 * 1024 / seconds:,.0f} pairs/s, one process")


if __name__ == "__main__":
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        measure_filter(Path(name))
        measure_models(Path(name))
        measure_reading(Path(name))
    measure_search(20_000, 512)
