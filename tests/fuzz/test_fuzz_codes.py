"""Damaged encodings: every sample is what was written, or an error."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.fuzz import time_limit
from helpers.mutations import ROUNDS, mutate, mutate_json

from dalle_fast.data import EncodedPairs, Encoding, encode_pairs
from dalle_fast.data.sources.scenes import SceneCorpus


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    def encode(images: torch.Tensor) -> torch.Tensor:
        return (images[:, 0, ::4, ::4] * 60_000).long()

    settings = Encoding(fingerprint="x", image_size=16, grid=(4, 4), draws=2, shard_size=5)
    encode_pairs(tmp_path / "codes", SceneCorpus(12, size=20), encode, settings)
    return tmp_path / "codes"


def read(folder: Path) -> list[tuple[np.ndarray, str]]:
    pairs = EncodedPairs(folder)
    return [pairs.seen_in(epoch, i) for i in range(len(pairs)) for epoch in range(2)]


@pytest.mark.parametrize("name", ["meta.json", "codes.npy", "captions.txt", "index.npy"])
def test_damaged_encodings(encoded: Path, name: str) -> None:
    path = encoded / name if name == "meta.json" else encoded / "shard-00001" / name
    whole, expected = path.read_bytes(), read(encoded)
    refused = 0
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        damaged = (mutate_json if name == "meta.json" and seed % 2 else mutate)(whole, rng)
        if name != "meta.json" and seed % 2:  # of the same size, else the size tells
            damaged = bytearray(whole)
            damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with time_limit(20):
            try:
                got = read(encoded)
                assert len(got) == len(expected), seed
                for (codes, caption), (right_codes, right_caption) in zip(got, expected, strict=True):
                    assert caption == right_caption and np.array_equal(codes, right_codes), seed
            except (ValueError, OSError):
                refused += 1
    assert refused > ROUNDS // 4
