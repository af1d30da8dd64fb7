"""The commands that prepare data, in samples per second: filter, encode, and dedup (embedding and search).

20,000 pairs in a tar shard are filtered; 4,096 scenes, rendered in the same time, are encoded and embedded by the
built-in models; 20,000 random embeddings of 512 are searched. Each is measured once: they take seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bench_data import as_file, photo, write_tar

from dalle_fast.data import Embedding, Encoding, embed_pairs, encode_pairs, filter_pairs, open_pairs
from dalle_fast.data.dedup import ApproximateNeighbours, ExactNeighbours, find_duplicates
from dalle_fast.data.filters import Filters
from dalle_fast.data.sources.scenes import SceneCorpus
from dalle_fast.pipeline import find_system, load_clip, load_dvae

PAIRS, SCENES = 20_000, 4_096
EMBEDDINGS, DIMENSIONS, THRESHOLD = 20_000, 512, 0.95


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


@pytest.fixture(scope="session")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of scenes, no two of them the same, and one 256 x 256 JPEG file for all."""
    content = as_file(photo(0).resize((256, 256)), "JPEG")
    members: dict[str, bytes] = {}
    for i, caption in enumerate(SceneCorpus(PAIRS).captions()):
        members |= {f"{i:06}.jpg": content, f"{i:06}.txt": f"{caption} number {i}".encode()}
    return write_tar(tmp_path_factory.mktemp("filter") / "shard.tar", members)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("language", ["en", "none"])
def test_filter(record, shard, tmp_path, language, workers):
    if language != "none":
        pytest.importorskip("py3langid")
    pairs, filters = open_pairs(shard), Filters(language=language)
    dropped, seconds = timed(lambda: filter_pairs(tmp_path / "kept", shard, pairs, filters, workers))
    assert len(open_pairs(tmp_path / "kept")) == PAIRS - sum(dropped.values()) > PAIRS / 2
    name = f"data: filter, language {language}, {workers} workers"
    record(name, seconds / PAIRS, **{"samples/s": PAIRS / seconds})


@pytest.mark.parametrize("draws", [1, 4])
def test_encode(record, tmp_path, draws):
    dvae = load_dvae(find_system("tiny"))
    grid = (dvae.cfg.grid, dvae.cfg.grid)
    encoding = Encoding(fingerprint="tiny", image_size=dvae.cfg.image_size, grid=grid, draws=draws)
    encoded, seconds = timed(lambda: encode_pairs(tmp_path / "codes", SceneCorpus(SCENES), dvae.encode, encoding))
    assert (len(encoded), encoded.draws, encoded[0].codes.shape) == (SCENES, draws, grid)
    images = SCENES * draws
    record(f"data: encode, {draws} draws", seconds / images, **{"samples/s": images / seconds})


def test_embed(record, tmp_path):
    clip = load_clip(find_system("tiny")).requires_grad_(False)
    embedding = Embedding(fingerprint="tiny", image_size=clip.cfg.image_size)
    scenes = SceneCorpus(SCENES)
    done, seconds = timed(lambda: embed_pairs(tmp_path / "embeddings", scenes, clip.encode_image, embedding))
    assert done
    record("data: embed", seconds / SCENES, **{"samples/s": SCENES / seconds})


@pytest.fixture(scope="session")
def embeddings() -> tuple[torch.Tensor, set[int]]:
    """Unit vectors, of which a tenth resembles an earlier one at a cosine of about 0.98; and the rows of that tenth."""
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(EMBEDDINGS, DIMENSIONS, generator=generator), dim=1)
    rows = torch.randperm(EMBEDDINGS - 1, generator=generator)[: EMBEDDINGS // 10].sort().values + 1
    noise = F.normalize(torch.randn(len(rows), DIMENSIONS, generator=generator), dim=1)
    for row, difference in zip(rows.tolist(), noise, strict=True):
        vectors[row] = vectors[int(torch.randint(row, (1,), generator=generator))] + 0.2 * difference
    return F.normalize(vectors, dim=1), set(rows.tolist())


@pytest.mark.parametrize("search", ["exact", "usearch"])
def test_find_duplicates(record, embeddings, search):
    """A few planted ones stay: they resemble an image that is dropped itself, and are further from the kept one."""
    if search == "usearch":
        pytest.importorskip("usearch")
    vectors, planted = embeddings
    kept = ExactNeighbours(EMBEDDINGS) if search == "exact" else ApproximateNeighbours()
    blocks = [(np.arange(EMBEDDINGS), vectors)]
    duplicates, seconds = timed(lambda: list(find_duplicates(blocks, THRESHOLD, kept)))
    found = {duplicate.row for duplicate in duplicates}
    share = len(found) / len(planted)
    assert found <= planted and share > 0.9
    name = f"data: dedup {EMBEDDINGS:,} x {DIMENSIONS}, {search}"
    record(name, seconds, **{"samples/s": EMBEDDINGS / seconds, "found": share})
