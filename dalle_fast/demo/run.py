"""The whole system on drawn scenes, from nothing: train all four models, draw pictures, and judge them.

``python -m dalle_fast.demo.run --pretrained`` trains longer, by the same recipe, and writes the model that ships.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..config import PRESETS
from ..data.codes import EncodedPair
from ..data.pairs import Pair
from ..data.sources.scenes import Scene, SceneCorpus, all_scenes
from ..figures import contact_sheet, draw_codes, draw_logs, save_image
from ..models import DiscreteVAE, load_model, save_model
from ..pipeline import BUILT_IN, TextToImage
from ..tokenizer import Tokenizer
from ..training import train_clip, train_dalle, train_dvae
from ..training.metrics import perplexity
from ..training.settings import TRAIN_PRESETS
from . import DEMO_STEPS
from .judge import detect, verdict

CANDIDATES = 16  # drawn for each caption that is judged


# ---------------------------------------------------------------------------------------------- judging


def judge(pipe: TextToImage, scenes: list[Scene], seed: int) -> dict[str, float]:
    """How often pictures show what their captions say, in shares; one draw of ``CANDIDATES`` for each scene.

    ``single``: a candidate taken at random; ``best``: the one that CLIP likes best; ``any``: at least one of them.
    ``items`` and ``relation`` split the best one's verdict: the right shapes in the right colours; and, of those
    that have them, in the right relation.
    """
    single: list[float] = []
    best, any_of_them, items, relations = [], [], [], []
    for i, scene in enumerate(scenes):
        drawn = pipe(scene.caption, n=CANDIDATES, top=CANDIDATES, seed=seed + i)
        hits = [verdict(scene, found) for found in detect(drawn.images)]
        right = [all(hit) for hit in hits]
        single.append(float(np.mean(right)))
        best.append(right[0])
        any_of_them.append(any(right))
        items.append(hits[0][0])
        if hits[0][0] and scene.second is not None:
            relations.append(hits[0][1])
    shares = {"single": single, "best": best, "any": any_of_them, "items": items, "relation": relations}
    return {name: round(float(np.mean(np.array(values, float))), 4) for name, values in shares.items() if values}


def stack(pairs: Iterable[Pair]) -> torch.Tensor:
    """Pictures as the models take them: float [B, 3, S, S] in [0, 1]."""
    return torch.from_numpy(np.stack([pair.image for pair in pairs])).permute(0, 3, 1, 2) / 255


def read_right(corpus: SceneCorpus, pictures: torch.Tensor) -> float:
    """The share of pictures, the i-th of scene i, in which the judge finds exactly that scene."""
    return round(float(np.mean([all(verdict(corpus.scene(i), found)) for i, found in enumerate(detect(pictures))])), 4)


# ---------------------------------------------------------------------------------------------- the run


@torch.no_grad()
def encode_all(dvae: DiscreteVAE, pairs: list[Pair], batch: int = 256) -> list[EncodedPair]:
    """Every picture as its codes."""
    encoded: list[EncodedPair] = []
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        codes = dvae.encode(stack(some)).numpy()
        encoded += [EncodedPair(grid, pair.caption) for grid, pair in zip(codes, some, strict=True)]
    return encoded


def run(
    out: Path, pairs: int = 20_000, captions: int = 40, steps: tuple[int, int, int] = DEMO_STEPS
) -> dict[str, object]:
    """Train, draw and judge; fill the folder ``out`` and return what metrics.json holds.

    A run that was stopped goes on from its last save when started again on the same folder.

    Args:
        pairs: scenes drawn for training.
        captions: how many are judged, on each side of the split.
        steps: updates of the dVAE, of the transformer, of CLIP; all else is the preset "tiny".
    """
    dvae_steps, dalle_steps, clip_steps = steps
    mark = time.monotonic()
    seconds: dict[str, float] = {}

    def lap(stage: str, trained: dict[str, float] | None = None) -> None:
        """Note how long a stage took; of a training, which may have gone on from a save, over all its runs."""
        nonlocal mark
        seconds[stage] = round(trained["seconds"] if trained else time.monotonic() - mark, 1)
        mark = time.monotonic()
        print(f"{stage}: {seconds[stage]:.0f} s", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    cfg, tiny = PRESETS["tiny"], TRAIN_PRESETS["tiny"]
    val_corpus = SceneCorpus(512, seed=1)
    train, val = list(SceneCorpus(pairs)), list(val_corpus)
    tokenizer = Tokenizer.train((p.caption for p in train), cfg.dalle.text_vocab, cfg.dalle.text_len)
    tokenizer.save(out / "tokenizer.json")
    lap("scenes and tokenizer")
    dvae_settings = replace(tiny.dvae, steps=dvae_steps, lr_steps=dvae_steps, tau_steps=dvae_steps)
    dvae, trained = train_dvae(train, val, cfg.dvae, dvae_settings, out)
    lap("dvae", trained)
    codes, val_codes = encode_all(dvae, train), encode_all(dvae, val)
    lap("codes of all scenes")
    _, trained = train_dalle(codes, val_codes, tokenizer, cfg.dalle, replace(tiny.dalle, steps=dalle_steps), out)
    lap("dalle", trained)
    _, trained = train_clip(train, val, tokenizer, cfg.clip, replace(tiny.clip, steps=clip_steps), out)
    lap("clip", trained)

    originals = stack(val)
    grids = torch.from_numpy(np.stack([pair.codes for pair in val_codes]))
    copies = dvae.decode(grids)
    both = torch.stack([originals[:16], copies[:16]], 1).flatten(0, 1)
    save_image(contact_sheet(both, ["picture", "through the dVAE"] * 16, columns=8), out / "reconstructions.png")
    counts = np.bincount(grids.flatten().numpy(), minlength=cfg.dvae.vocab_size)
    draw_codes(counts, out / "codes.png")
    draw_logs(out)

    pipe = TextToImage.load(out)
    rng = np.random.default_rng(0)
    metrics: dict[str, object] = {
        "codes_used": int((counts > 0).sum()),
        "codes": cfg.dvae.vocab_size,
        "code_perplexity": round(perplexity(torch.from_numpy(counts)), 2),
        "reconstruction_mse": round((copies - originals).square().mean().item(), 5),
        "reconstruction_read_right": read_right(val_corpus, copies),
    }
    for side, held_out in (("seen", False), ("held_out", True)):
        scenes = all_scenes(held_out)
        chosen = [scenes[i] for i in rng.choice(len(scenes), min(captions, len(scenes)), replace=False)]
        metrics[side] = {"captions": len(chosen), **judge(pipe, chosen, seed=1000)}
        drawn = SceneCorpus(500, seed=99, held_out=held_out)
        metrics[f"detector_right_on_drawn_{side}"] = read_right(drawn, stack(drawn))
    _draw_sheet(pipe, out / "sheet.png")
    lap("pictures and verdicts")
    metrics["seconds"] = {**seconds, "all": round(sum(seconds.values()), 1)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def _draw_sheet(pipe: TextToImage, path: Path) -> None:
    """sheet.png: the best four of sixteen for captions of both sides of the split."""
    rng = np.random.default_rng(1)
    images, labels = [], []
    for held_out in (False, True):
        scenes = [scene for scene in all_scenes(held_out) if scene.second is not None]
        for i in rng.choice(len(scenes), 4, replace=False):
            result = pipe(scenes[i].caption, n=CANDIDATES, top=4, seed=0)
            images.append(result.images)
            side = "held out" if held_out else "seen"
            labels += [f"{result.caption} ({side})\n{score:.1f}" for score in result.scores.tolist()]
    save_image(contact_sheet(torch.cat(images), labels, columns=8), path)


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
