"""Damaged tokenizer files: the same tokens, or an error that names the file."""

import json
import random
from pathlib import Path

import pytest
import torch
from helpers.fuzz import time_limit
from helpers.mutations import ROUNDS, mutate, mutate_json

from dalle_fast.tokenizer import Tokenizer

CAPTIONS = ["a red circle above a blue square", "the green triangle", "日本 & ü"]


@pytest.mark.parametrize("with_checksum", [True, False])
def test_damaged_tokenizers(tmp_path: Path, with_checksum: bool) -> None:
    """Files of older versions have no checksum: other sizes and names of tokens can pass there, but nothing crashes."""
    path = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.train(CAPTIONS * 3, 300, 40)
    tokenizer.save(path)
    content = json.loads(path.read_text())
    if not with_checksum:
        del content["checksum"]
    whole = json.dumps(content, ensure_ascii=False).encode()
    expected = tokenizer.encode(CAPTIONS)
    refused = 0
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        path.write_bytes((mutate_json if seed % 2 else mutate)(whole, rng))
        with time_limit(20):
            try:
                loaded = Tokenizer.load(path)
                for encoded in (loaded.encode(CAPTIONS, truncate=True), loaded.encode(CAPTIONS, 0, 0.0, True)):
                    if with_checksum:
                        assert torch.equal(encoded, expected), seed
            except ValueError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > ROUNDS // 2
