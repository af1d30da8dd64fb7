"""The model that ships: small enough, and what it draws is what it is told."""

import json

import numpy as np
import pytest

from dalle_fast.data.sources.scenes import all_scenes
from dalle_fast.demo.judge import detect, verdict
from dalle_fast.demo.run import CANDIDATES
from dalle_fast.pipeline import BUILT_IN, TextToImage


def test_shipped_model_is_small():
    assert sum(path.stat().st_size for path in (BUILT_IN / "tiny").iterdir()) <= 12 * 2**20


@pytest.mark.parametrize("held_out,least", [(False, 0.75), (True, 0.6)])
def test_shipped_model_draws_what_it_is_told(held_out, least):
    """A sample of what metrics.json beside the weights says of many more captions, with room for its small size."""
    pipe = TextToImage.load("tiny")
    scenes = all_scenes(held_out)
    chosen = np.random.default_rng(5).choice(len(scenes), 20, replace=False)
    right = []
    for i in chosen:
        found = detect(pipe(scenes[i].caption, n=CANDIDATES, top=1, seed=int(i)).images)[0]
        right.append(all(verdict(scenes[i], found)))
    assert np.mean(right) >= least
    measured = json.loads((BUILT_IN / "tiny" / "metrics.json").read_text())
    assert measured["held_out" if held_out else "seen"]["best"] >= (0.75 if held_out else 0.9)
    assert measured["codes_used"] >= measured["codes"] / 4
