"""The way of a pair from the disk into a batch, stage by stage, in samples per second.

512 JPEG files of 500 x 375 pixels (a usual size of web photos) in two tar shards, read from the page cache; crops of
256 x 256; captions of ten words; batches of 32. Stages run in one thread, but for the dVAE.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dalle_fast as df
from dalle_fast.data import Batches, Encoding, collate, images, open_pairs
from dalle_fast.data.augment import augment_dalle, augment_dvae
from dalle_fast.data.encode import encode_pairs
from dalle_fast.data.shuffle import shuffled
from dalle_fast.data.sources.scenes import SceneCorpus
from dalle_fast.data.sources.tar import ShardPairs
from dalle_fast.tokenizer import Tokenizer
from dalle_fast.training.task import captioned_sample

IMAGES, SHARDS, WIDTH, HEIGHT, SIZE = 512, 2, 500, 375, 256
BATCH, BATCHES = 32, 24  # size and number of batches, to measure the whole way


def photo(i: int) -> Image.Image:
    """Blurred noise with a little grain: about 60 KB as a JPEG file, as photos have."""
    rng = np.random.default_rng(i)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), Image.BICUBIC)
    grain = np.asarray(smooth) + rng.normal(0, 6, (HEIGHT, WIDTH, 3))
    return Image.fromarray(grain.clip(0, 255).astype(np.uint8))


def as_file(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def captions() -> list[str]:
    """Ten words each, with the frequencies of words of a language: the k-th in proportion to 1 / k."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    words = ["".join(rng.choice(letters[:16], rng.integers(2, 10))) for _ in range(5_000)]
    weights = 1 / np.arange(1, len(words) + 1)
    return [" ".join(rng.choice(words, 10, p=weights / weights.sum())) for _ in range(20 * IMAGES)]


@pytest.fixture(scope="session")
def tokenizer(captions: list[str]) -> Tokenizer:
    return Tokenizer.train(captions, 16_384, 256)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory, captions: list[str]) -> ShardPairs:
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        members: dict[str, bytes] = {}
        for i in range(shard, IMAGES, SHARDS):
            members |= {f"{i}.jpg": as_file(photo(i), "JPEG"), f"{i}.txt": captions[i].encode()}
        write_tar(folder / f"{shard}.tar", members)
    pairs = open_pairs(folder)
    assert isinstance(pairs, ShardPairs)
    assert len(pairs) == IMAGES
    return pairs


# ---------------------------------------------------------------------------------------------- stages


def test_shuffle(race):
    n = 250_000_000
    numbers = np.arange(1_024)
    assert len(np.unique(shuffled(numbers, n, 0, 0))) == len(numbers)
    race("data: order of 250M pairs", lambda: shuffled(numbers, n, 0, 0), {}, expected=None, samples=len(numbers))


def test_read(race, pairs, captions):
    order = shuffled(np.arange(IMAGES), IMAGES, 0, 0).tolist()

    def read():
        return [(files.image(record), files.caption(record)) for files, record in map(pairs.find, order)]

    found = read()
    expected = [captions[i] for shard in range(SHARDS) for i in range(shard, IMAGES, SHARDS)]
    assert [caption for _, caption in found] == [expected[i] for i in order]
    size = sum(len(content) for content, _ in found)
    race("data: read from shards", read, {}, expected=None, samples=IMAGES, bytes=size)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_decode(race, kind):
    files = [as_file(photo(i), kind) for i in range(32)]

    def decode():
        return [images.decode_image(content) for content in files]

    def with_pillow():
        decoder, images.simplejpeg = images.simplejpeg, None
        try:
            return decode()
        finally:
            images.simplejpeg = decoder

    for ours, pillows in zip(decode(), with_pillow(), strict=True):
        assert np.abs(ours.astype(int) - pillows).max() <= 1
    peers = {"Pillow": with_pillow} if kind == "JPEG" else {}
    race(f"data: decode {kind}, {WIDTH} x {HEIGHT}", decode, peers, expected=None, samples=len(files))


@pytest.mark.parametrize("augment", [augment_dvae, augment_dalle], ids=lambda augment: augment.__name__)
def test_augment(race, augment):
    pixels = [np.asarray(photo(i)) for i in range(32)]

    def crop():
        return [augment(image, SIZE, np.random.default_rng(i)) for i, image in enumerate(pixels)]

    assert all(image.shape == (SIZE, SIZE, 3) for image in crop())
    race(f"data: {augment.__name__} to {SIZE}", crop, {}, expected=None, samples=len(pixels))


@pytest.mark.parametrize("dropout", [True, False], ids=["BPE dropout", "plain"])
def test_tokenize(race, tokenizer, captions, dropout):
    texts = captions[:256]

    def tokenize():
        return [tokenizer.encode(text, seed=i if dropout else None) for i, text in enumerate(texts)]

    assert [tokenizer.decode(tokens[0]) for tokens in tokenize()] == texts
    race(f"data: tokens{', BPE dropout' * dropout}", tokenize, {}, expected=None, samples=len(texts))


def test_collate(race):
    samples = [{"image": np.asarray(photo(i))[:SIZE, :SIZE].copy()} for i in range(BATCH)]
    expected = torch.stack([torch.from_numpy(sample["image"]) for sample in samples]).permute(0, 3, 1, 2) / 255
    moved = BATCH * SIZE * SIZE * 3 * (1 + 1 + 1 + 4 + 4 + 4)  # stacked, converted, divided
    race(
        f"data: batch of {BATCH}, {SIZE} x {SIZE}",
        lambda: collate(samples)["image"],
        {},
        expected=expected,
        samples=BATCH,
        bytes=moved,
    )


def test_encode(race):
    dvae = df.TextToImage.load("tiny").dvae
    batch = collate([{"image": pair.image} for pair in SceneCorpus(64)])["image"]
    batch = batch.contiguous(memory_format=torch.channels_last)
    codes = dvae.encode(batch)
    assert (dvae.decode(codes) - batch).square().mean() < 0.01
    race("data: dVAE codes, tiny, 32 x 32", lambda: dvae.encode(batch), {}, expected=codes, samples=len(batch))


# ---------------------------------------------------------------------------------------------- the whole way


def per_second(batches: Batches) -> float:
    """Samples per second in steady state: without the start of the workers, and without batches prepared during it."""
    stream = batches.iterate()
    for _ in range(2 + 4 * batches.workers):
        next(stream)
    start = time.perf_counter()
    for _ in range(BATCHES):
        next(stream)
    return BATCHES * batches.batch_size / (time.perf_counter() - start)


def sample_of(tokenizer: Tokenizer, size: int | None):
    return partial(captioned_sample, size=size, tokenizer=tokenizer, bpe_dropout=True, caption_dropout=0.0)


@pytest.fixture
def record_batches(record, kept_memory):
    """Add the whole way to the table, with memory as in training."""

    def run(name: str, batches: Batches) -> None:
        first = batches.batch_at(0)
        again = next(batches.iterate())
        assert all(torch.equal(first[key], again[key]) for key in first)
        rate = per_second(batches)
        record(name, batches.batch_size / rate, **{"samples/s": rate})

    return run


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_of_images(record_batches, pairs, tokenizer, workers):
    batches = Batches(pairs, BATCH, sample_of(tokenizer, SIZE), seed=0, workers=workers)
    record_batches(f"data: images and tokens, {workers} workers", batches)


@pytest.fixture(scope="session")
def encoded(tmp_path_factory: pytest.TempPathFactory, pairs: ShardPairs) -> df.data.EncodedPairs:
    """Codes of 32 x 32: random ones, since reading does not depend on them."""
    generator = torch.Generator().manual_seed(0)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return torch.randint(8_192, (len(images), 32, 32), generator=generator)

    encoding = Encoding(fingerprint="random", image_size=32, grid=(32, 32))
    return encode_pairs(tmp_path_factory.mktemp("codes"), pairs, encode, encoding)


def test_read_codes(race, encoded):
    order = shuffled(np.arange(IMAGES), IMAGES, 0, 0).tolist()

    in_memory = np.stack([pair.codes for pair in encoded]).astype(np.uint16)

    def read():
        return [encoded[i] for i in order]

    def read_array():
        return [in_memory[i].astype(np.int64) for i in order]

    assert all(np.array_equal(pair.codes, codes) for pair, codes in zip(read(), read_array(), strict=True))
    peers = {"array in memory, unchecked": read_array}
    race("data: read codes, 32 x 32", read, peers, expected=None, samples=IMAGES, bytes=IMAGES * 32 * 32 * (2 + 8))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_of_codes(record_batches, encoded, tokenizer, workers):
    batches = Batches(encoded, BATCH, sample_of(tokenizer, None), seed=0, workers=workers)
    record_batches(f"data: codes and tokens, {workers} workers", batches)


# ---------------------------------------------------------------------------------------------- 250 million pairs


def test_big_index(record):
    """The measurements of ``big_index.py``, which asserts that lookups find what was written."""
    script = Path(__file__).with_name("big_index.py")
    output = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True).stdout
    result = json.loads(output)
    for name in ("cold", "warm"):
        memory = {"MB": result["memory, MB"]} if name == "warm" else {}
        record(f"data: open 250M pairs, {name}", result[f"start-up {name}, s"], **memory)
        rate = result[f"lookups/s {name}"]
        record(f"data: look up one of 250M, {name}", 1 / rate, **{"samples/s": rate})
