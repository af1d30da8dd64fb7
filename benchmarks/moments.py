"""Training loss with 16-bit and with float32 moments: the tiny transformer on scenes.

Run: python benchmarks/moments.py. It takes a few minutes on one core and writes docs/moments.png.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from matplotlib import pyplot as plt

import dalle_fast as df
from dalle_fast.data.sources.scenes import SceneCorpus
from dalle_fast.demo.run import encode_all
from dalle_fast.training import loop
from dalle_fast.training.dalle import DALLETask
from dalle_fast.training.settings import TRAIN_PRESETS

SCENES, STEPS, LAST, SEEDS = 2_000, 150, 50, (0, 1, 2)


def main() -> None:
    pipe = df.TextToImage.load("tiny")
    codes = encode_all(pipe.dvae, list(SceneCorpus(SCENES)))

    def losses(moments: str, seed: int) -> list[float]:
        short = {"steps": STEPS, "warmup_steps": 20, "batch_size": 8}
        config = replace(TRAIN_PRESETS["tiny"].dalle, **short, seed=seed, moments=moments)
        task = DALLETask(codes, None, pipe.tokenizer, pipe.dalle.cfg, config, None)
        state, batches, curve = loop.new_state(task.model, config), task.batches(0), []
        for state.step in range(STEPS):
            _, metrics = loop.train_step(state, task, next(batches), config.lr_at(state.step), config)
            curve.append(metrics["loss"].item())
        return curve

    print(f"mean loss of the last {LAST} of {STEPS} steps, nats")
    print(f"{'seed':>4} {'float32':>8} {'16-bit':>8} {'difference':>11}")
    curves = {moments: np.empty((len(SEEDS), STEPS)) for moments in ("float32", "16-bit")}
    for i, seed in enumerate(SEEDS):
        for moments, curve in curves.items():
            curve[i] = losses(moments, seed)
        full, half = (curve[i, -LAST:].mean() for curve in curves.values())
        print(f"{seed:>4} {full:>8.4f} {half:>8.4f} {half - full:>+11.1e}", flush=True)
    spreads = [np.ptp(curve[:, -LAST:].mean(1)) for curve in curves.values()]
    print(f"between seeds, largest - smallest: {spreads[0]:.4f} and {spreads[1]:.4f}")

    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
    for moments, style in (("float32", "-"), ("16-bit", "--")):
        above.plot(curves[moments].mean(0), style, label=f"{moments} moments, mean of {len(SEEDS)} seeds")
    above.set(ylabel="training loss (nats)")
    above.legend()
    full = curves["float32"]
    below.plot((full - full.mean(0)).T, color="lightgrey")
    below.plot((curves["16-bit"] - full).T, color="C1")
    below.set(xlabel="step", ylabel="grey: seed - mean of seeds\norange: 16-bit - float32")
    figure.savefig("docs/moments.png", dpi=90)


if __name__ == "__main__":
    main()
