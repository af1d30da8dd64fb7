"""The whole system on synthetic scenes, from scratch: train its four parts, generate images, and judge them.

``python -m dalle_fast.demo.run --pretrained`` trains longer, by the same recipe, and writes the model that ships.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..config import PRESETS
from ..data.batches import collate
from ..data.codes import EncodedPair
from ..data.pairs import Pair
from ..data.sources.scenes import SceneCorpus, all_scenes
from ..figures import contact_sheet, plot_codes, plot_logs, save_image
from ..files import write_atomically
from ..models import DiscreteVAE, load_model, save_model
from ..pipeline import BUILT_IN, TextToImage
from ..tokenizer import Tokenizer
from ..training import train_clip, train_dalle, train_dvae
from ..training.metrics import perplexity
from ..training.settings import TRAIN_PRESETS
from . import DEMO_STEPS
from .judge import CANDIDATES, evaluate, share_right

# The parts of a run: a description, and the share of the time in percent, measured on two cores.
PARTS = {
    "scenes and tokenizer": ("render the training images, learn a vocabulary from their captions", 2),
    "dvae": ("learn to turn images into codes and back", 19),
    "codes of all scenes": ("encode the training images", 2),
    "dalle": ("learn to continue captions with codes", 49),
    "clip": ("learn to rank images by how well they match a caption", 23),
    "images and verdicts": ("generate images for captions, judge them", 5),
}


def show_shipped(out: Path) -> None:
    """Generate eight captions with the model that ships, into ``out/shipped.png``."""
    start = time.monotonic()
    print("Eight captions with the model that ships:", flush=True)
    _save_sheet(TextToImage.load("tiny"), out / "shipped.png", top=1)
    seconds = time.monotonic() - start
    print(f"{out / 'shipped.png'}: the best of {CANDIDATES} images for each, {seconds:.0f} s", flush=True)


def run(
    out: Path, pairs: int = 20_000, captions: int = 40, steps: tuple[int, int, int] = DEMO_STEPS
) -> dict[str, object]:
    """Train, generate and judge; fill the folder ``out`` and return the content of its metrics.json.

    An interrupted run resumes from its last checkpoint when started again on the same folder.

    Args:
        pairs: scenes rendered for training.
        captions: captions judged, on each side of the split.
        steps: training steps of the dVAE, the transformer and CLIP; all else is the preset "tiny".
    """
    out.mkdir(parents=True, exist_ok=True)
    cfg, settings, seconds = PRESETS["tiny"], TRAIN_PRESETS["tiny"], dict[str, float]()
    dvae_steps, dalle_steps, clip_steps = steps
    with _part("scenes and tokenizer", seconds):
        val_corpus = SceneCorpus(512, seed=1)
        train, val = list(SceneCorpus(pairs)), list(val_corpus)
        tokenizer = Tokenizer.train((pair.caption for pair in train), cfg.dalle.text_vocab, cfg.dalle.text_len)
        tokenizer.save(out / "tokenizer.json")
    with _part("dvae", seconds):
        short_dvae = replace(settings.dvae, steps=dvae_steps, lr_steps=dvae_steps, tau_steps=dvae_steps)
        dvae, trained = train_dvae(train, val, cfg.dvae, short_dvae, out)
        seconds["dvae"] = trained["seconds"]
    with _part("codes of all scenes", seconds):
        codes, val_codes = encode_all(dvae, train), encode_all(dvae, val)
    with _part("dalle", seconds):
        short_dalle = replace(settings.dalle, steps=dalle_steps)
        _, trained = train_dalle(codes, val_codes, tokenizer, cfg.dalle, short_dalle, out)
        seconds["dalle"] = trained["seconds"]
    with _part("clip", seconds):
        short_clip = replace(settings.clip, steps=clip_steps)
        _, trained = train_clip(train, val, tokenizer, cfg.clip, short_clip, out)
        seconds["clip"] = trained["seconds"]
    with _part("images and verdicts", seconds):
        plot_logs(out)
        pipe = TextToImage.load(out)
        metrics = _judge_codes(dvae, val_corpus, val_codes, out) | _judge_images(pipe, captions)
        _save_sheet(pipe, out / "sheet.png", top=4)
    seconds = {name: round(value, 1) for name, value in seconds.items()}
    metrics["seconds"] = {**seconds, "all": round(sum(seconds.values()), 1)}
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


@contextmanager
def _part(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Announce a part, run it, and note its seconds, unless it notes them itself: a training counts all its runs."""
    description, share = PARTS[name]
    print(f"[{[*PARTS].index(name) + 1}/{len(PARTS)}] {name}: {description}, about {share} % of the time", flush=True)
    start = time.monotonic()
    yield
    print(f"      {seconds.setdefault(name, time.monotonic() - start):.0f} s", flush=True)


# ---------------------------------------------------------------------------------------------- images and codes


def stack_images(pairs: Iterable[Pair]) -> torch.Tensor:
    """Images of one size as the models take them: float [B, 3, S, S] in [0, 1]."""
    return collate([{"image": pair.image} for pair in pairs])["image"]


@torch.no_grad()
def encode_all(dvae: DiscreteVAE, pairs: list[Pair], batch: int = 256) -> list[EncodedPair]:
    """All pairs with the codes of their images."""
    encoded: list[EncodedPair] = []
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        codes = dvae.encode(stack_images(some)).numpy()
        encoded += [EncodedPair(grid, pair.caption) for grid, pair in zip(codes, some, strict=True)]
    return encoded


# ---------------------------------------------------------------------------------------------- judging


def _judge_codes(dvae: DiscreteVAE, corpus: SceneCorpus, codes: list[EncodedPair], out: Path) -> dict[str, object]:
    """Use of the codes of a corpus and quality of its reconstructions; codes.png and reconstructions.png."""
    originals, grids = stack_images(corpus), torch.from_numpy(np.stack([pair.codes for pair in codes]))
    copies = dvae.decode(grids)
    beside = torch.stack([originals[:16], copies[:16]], 1).flatten(0, 1)
    save_image(contact_sheet(beside, ["image", "through the dVAE"] * 16, columns=8), out / "reconstructions.png")
    counts = np.bincount(grids.flatten().numpy(), minlength=dvae.cfg.vocab_size)
    plot_codes(counts, out / "codes.png")
    return {
        "codes_used": int((counts > 0).sum()),
        "codes": dvae.cfg.vocab_size,
        "code_perplexity": round(perplexity(torch.from_numpy(counts)), 2),
        "reconstruction_mse": round((copies - originals).square().mean().item(), 5),
        "reconstruction_read_right": share_right(corpus, copies),
    }


def _judge_images(pipe: TextToImage, captions: int) -> dict[str, object]:
    """Shares of right images for captions of both sides of the split, and of the judge itself on rendered scenes."""
    rng = np.random.default_rng(0)
    metrics: dict[str, object] = {}
    for side, held_out in (("seen", False), ("held_out", True)):
        scenes = all_scenes(held_out)
        chosen = [scenes[i] for i in rng.choice(len(scenes), min(captions, len(scenes)), replace=False)]
        metrics[side] = {"captions": len(chosen), **evaluate(pipe, chosen, seed=1000)}
        rendered = SceneCorpus(500, seed=99, held_out=held_out)
        metrics[f"detector_right_on_drawn_{side}"] = share_right(rendered, stack_images(rendered))
    return metrics


def _save_sheet(pipe: TextToImage, path: Path, top: int) -> None:
    """The best images for eight captions, four of each side of the split."""
    rng = np.random.default_rng(1)
    images, labels = [], []
    for held_out in (False, True):
        scenes = [scene for scene in all_scenes(held_out) if scene.second is not None]
        for i in rng.choice(len(scenes), 4, replace=False):
            result = pipe(scenes[i].caption, n=CANDIDATES, top=top)
            images.append(result.images)
            side = "held out" if held_out else "seen"
            labels += [f"{result.caption} ({side})\n{score:.1f}" for score in result.scores.tolist()]
    save_image(contact_sheet(torch.cat(images), labels, columns=4 * min(top, 2)), path)


# ---------------------------------------------------------------------------------------------- the model that ships


def make_pretrained(out: Path) -> dict[str, object]:
    """Train the model that ships, and write it to the package in half precision."""
    metrics = run(out, pairs=40_000, captions=200, steps=(4_000, 4_000, 2_500))
    target = BUILT_IN / "tiny"
    for kind in ("dvae", "dalle", "clip"):
        save_model(load_model(out / f"{kind}.safetensors"), target / f"{kind}.safetensors", half=True)
    Tokenizer.load(out / "tokenizer.json").save(target / "tokenizer.json")
    (target / "metrics.json").write_text((out / "metrics.json").read_text())
    return metrics


if __name__ == "__main__":
    if sys.argv[1:] != ["--pretrained"]:
        sys.exit("usage: python -m dalle_fast.demo.run --pretrained")
    print(json.dumps(make_pretrained(Path("runs/pretrained")), indent=2))
