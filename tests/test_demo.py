"""The demo, very short: everything it promises is there. And the model that ships: what it draws is what it is told."""

import json

import numpy as np
import pytest
from PIL import Image

from dalle_fast.data.detector import detect, verdict
from dalle_fast.data.scenes import all_scenes
from dalle_fast.demo import CANDIDATES, recipe, run
from dalle_fast.pipeline import BUILT_IN, TextToImage


def test_demo_fills_its_folder(tmp_path):
    plan = recipe(pairs=200, captions=2, dvae_steps=3, dalle_steps=2, clip_steps=2)
    metrics = run(tmp_path, plan)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    for name in ("reconstructions", "sheet", "losses", "codes"):
        assert min(Image.open(tmp_path / f"{name}.png").size) > 100
    assert metrics["codes"] == 128 and 1 <= metrics["codes_used"] <= 128
    for side in ("seen", "held_out"):
        assert metrics[side]["captions"] == 2
        assert 0 <= metrics[side]["single"] <= metrics[side]["any"] <= 1
        assert metrics[f"detector_right_on_drawn_{side}"] >= 0.98


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
