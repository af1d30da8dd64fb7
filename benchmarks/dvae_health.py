"""Error of a dVAE on held-out emoji, against k-means patches of the same rate: as many codes, the same grid.

Run: dalle-fast data emoji --out emoji --size 32, then python benchmarks/dvae_health.py emoji. It takes some minutes on
one core and writes docs/emoji-reconstructions.png.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from dalle_fast.config import PRESETS
from dalle_fast.data import open_pairs
from dalle_fast.demo.run import stack_images
from dalle_fast.figures import contact_sheet, save_image
from dalle_fast.models.codebook_init import image_patches, kmeans, nearest
from dalle_fast.training import train_dvae
from dalle_fast.training.metrics import perplexity
from dalle_fast.training.settings import TRAIN_PRESETS

SHOWN = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("emoji", type=Path, help="folder of the emoji")
    parser.add_argument("--codes", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2_500, help="training steps of the dVAE")
    parser.add_argument("--out", type=Path, default=Path("docs/emoji-reconstructions.png"))
    arguments = parser.parse_args()
    train, val = (list(open_pairs(arguments.emoji / split)) for split in ("train", "val"))
    cfg, steps = replace(PRESETS["tiny"].dvae, vocab_size=arguments.codes), arguments.steps
    settings = replace(TRAIN_PRESETS["tiny"].dvae, steps=steps, lr_steps=steps, tau_steps=steps)
    originals = stack_images(val)

    patches = image_patches(stack_images(train), cfg.downsampling)
    centroids = kmeans(patches.flatten(0, 1), cfg.vocab_size)
    kmeans_codes = nearest(image_patches(originals, cfg.downsampling).flatten(0, 1), centroids)
    chosen = centroids[kmeans_codes].unflatten(0, (len(val), -1)).transpose(1, 2)
    kmeans_copies = torch.nn.functional.fold(chosen, cfg.image_size, cfg.downsampling, stride=cfg.downsampling)

    with tempfile.TemporaryDirectory() as out:
        dvae, _ = train_dvae(train, None, cfg, settings, out)
    codes = dvae.encode(originals)
    copies = dvae.decode(codes)

    print(f"{len(val)} held-out emoji, {cfg.grid} x {cfg.grid} of {cfg.vocab_size} codes, {steps} steps")
    print("| | mean squared error | codes used | perplexity of the codes |\n|---|---|---|---|")
    rows = (("k-means patches", kmeans_codes, kmeans_copies), ("dVAE", codes.flatten(), copies))
    for name, used, images in rows:
        counts = torch.bincount(used, minlength=cfg.vocab_size)
        mse = (images - originals).square().mean()
        print(f"| {name} | {mse:.5f} | {int((counts > 0).sum())} | {perplexity(counts):.1f} |")
    some = torch.arange(SHOWN) * len(val) // SHOWN
    images = torch.cat([originals[some], kmeans_copies[some], copies[some]])
    labels = [label for label in ("original", "k-means", "dVAE") for _ in range(SHOWN)]
    save_image(contact_sheet(images, labels, columns=SHOWN), arguments.out)


if __name__ == "__main__":
    main()
