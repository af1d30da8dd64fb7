"""Damaged manifests and caption files: every row is a pair of an image and a caption of theirs, or named."""

import json
import random
from pathlib import Path

import pytest
from helpers.fuzz import time_limit
from helpers.mutations import ROUNDS, mutate
from helpers.tars import png

from dalle_fast.captions import clean_caption
from dalle_fast.data import BrokenSample, open_pairs

ROWS = [("a.png", "a red box"), ("b.png", 'the "blue", box'), ("c.png", "two\nlines"), ("d.png", "日本 ü")] * 3


def table(separator: str) -> str:
    lines = [separator.join(("image", "caption"))]
    lines += [separator.join((image, '"' + caption.replace('"', '""') + '"')) for image, caption in ROWS]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "a.txt"])
def test_damaged_manifests(tmp_path: Path, name: str) -> None:
    for image in "abcd":
        (tmp_path / f"{image}.png").write_bytes(png())
        (tmp_path / f"{image}.txt").write_text("a caption\nanother one\n")
    whole = {
        "rows.csv": table(","),
        "rows.tsv": table("\t"),
        "rows.jsonl": "\n".join(json.dumps({"image": image, "caption": [caption]}) for image, caption in ROWS),
        "a.txt": "first & second\n" * 5,
    }[name].encode()
    path = tmp_path / name
    for seed in range(ROUNDS):
        path.write_bytes(mutate(whole, random.Random(seed)))
        with time_limit(20):
            try:
                pairs = open_pairs(tmp_path if name == "a.txt" else path)
            except ValueError as error:
                assert str(tmp_path) in str(error)
                continue
            assert len(pairs) + len(pairs.skipped) > 0
            for caption in pairs.captions():
                assert caption == clean_caption(caption) != "", seed
            for i in range(len(pairs)):
                try:
                    assert pairs[i].image.shape == (4, 5, 3)
                    assert pairs.seen_in(seed, i).caption in pairs.all_captions(i)
                except BrokenSample:
                    pass
