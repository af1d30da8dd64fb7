"""Damaged views: the pairs that were kept, or an error, never other pairs."""

import random
from pathlib import Path

import pytest
from helpers.fuzz import time_limit
from helpers.mutations import ROUNDS, mutate, mutate_json
from helpers.tars import png

from dalle_fast.data import BrokenSample, open_pairs
from dalle_fast.data.sources.view import Dropped, write_view


@pytest.mark.parametrize("name", ["view.json", "kept.npy"])
def test_damaged_views(tmp_path: Path, name: str) -> None:
    source, view = tmp_path / "source", tmp_path / "view"
    source.mkdir()
    for i in range(20):
        (source / f"{i:02}.png").write_bytes(png((i, 0, 0)))
        (source / f"{i:02}.txt").write_text(f"caption {i}")
    write_view(view, source, open_pairs(source), [Dropped(i, "red", {}) for i in (1, 5, 6)], {})
    expected = list(open_pairs(view).captions())
    whole = (view / name).read_bytes()
    refused = 0
    for seed in range(ROUNDS):
        rng = random.Random(seed)
        change = mutate_json if name == "view.json" and seed % 2 else mutate
        (view / name).write_bytes(change(whole, rng))
        with time_limit(20):
            try:
                pairs = open_pairs(view)
                assert [pairs[i].caption for i in range(len(pairs))] == list(pairs.captions()) == expected, seed
            except (ValueError, OSError, BrokenSample):
                refused += 1
    assert refused > ROUNDS // 4
