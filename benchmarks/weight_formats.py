"""Cost in quality of 16- and 8-bit weights: the shipped model, judged on the same captions and seeds.

Run: python benchmarks/weight_formats.py
"""

from __future__ import annotations

import numpy as np

import dalle_fast as df
from dalle_fast.data.sources.scenes import all_scenes
from dalle_fast.demo.judge import CANDIDATES, evaluate

CAPTIONS = 60


def main() -> None:
    pipe = df.TextToImage.load("tiny")
    scenes = all_scenes(held_out=False)
    rng = np.random.default_rng(0)
    chosen = [scenes[i] for i in rng.choice(len(scenes), CAPTIONS, replace=False)]
    print(f"{'weights':<10} {'one candidate':>14} {f'best of {CANDIDATES}':>11}")
    for weights in ("float32", "bfloat16", "int8"):
        pipe.dalle.pack(weights)
        shares = evaluate(pipe, chosen, seed=1000)
        print(f"{weights:<10} {shares['single']:>14.1%} {shares['best']:>11.1%}", flush=True)


if __name__ == "__main__":
    main()
