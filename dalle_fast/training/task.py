"""A task: what one of the models learns from. The data side of all three, and the tokenizer.

The models are in dvae.py, clip.py and dalle.py, each with its loss and validation; loop.py trains any of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import CLIPConfig, DALLEConfig
from ..data.augment import augment_dalle, center_crop_resize
from ..data.batches import Batch, Batches, Corpus, collate
from ..data.pairs import BrokenSample, Pair
from ..distributed.start import Start
from ..distributed.world import ALONE, World
from ..tokenizer import Tokenizer
from .plan import available_memory, plan_run, refuse_what_cannot_fit
from .scales import Scales
from .settings import TrainConfig

Sample = dict[str, Any]
MAX_SEED = 2**63


def train_tokenizer(
    captions: Iterable[str], out: str | Path, vocab_size: int = 16384, text_len: int = 256
) -> Tokenizer:
    """Learn the vocabulary from captions and write it to ``out/tokenizer.json``."""
    tokenizer = Tokenizer.train(captions, vocab_size, text_len)
    Path(out).mkdir(parents=True, exist_ok=True)
    tokenizer.save(Path(out) / "tokenizer.json")
    return tokenizer


def check_memory(
    model_class: Callable[[Any], nn.Module], model_cfg: Any, train_cfg: TrainConfig, world: World = ALONE
) -> None:
    """Say on stderr what a training will need, before it takes any of it.

    Raises:
        ValueError: more than the device has; the message names what would fit.
    """
    with torch.device("meta"):
        model = model_class(model_cfg)
    available = available_memory(torch.device(train_cfg.device))
    plan = plan_run(model, model_cfg, train_cfg, available, world.shards, world.size)
    refuse_what_cannot_fit(plan, train_cfg.batch_size, world.size)
    if world.is_first:
        print(plan, file=sys.stderr)


class CorpusTask:
    """The data side of a task: ``sample`` is what training sees of a pair, ``val_sample`` what validation sees."""

    start: Start | None = None
    scales: Scales | None = None

    def __init__(
        self,
        pairs: Corpus,
        val_pairs: Corpus | None,
        sample: Callable[[Any, np.random.Generator], Sample],
        val_sample: Callable[[Any], Sample],
        config: TrainConfig,
        world: World,
    ) -> None:
        self._batches = Batches(pairs, config.batch_size, sample, config.seed, config.workers, world.rank, world.size)
        self._world = world
        self._val_pairs = val_pairs
        self._val_sample = val_sample
        self._val_samples = config.val_samples
        self._val_batch_size = config.batch_size // world.size

    def batches(self, start: int) -> Iterator[Batch]:
        return self._batches.iterate(start)

    def validation(self) -> Iterator[tuple[Batch, int]]:
        """Held-out samples in batches, spread evenly over their corpus; broken ones are left out."""
        if self._val_pairs is None:
            return
        total = len(self._val_pairs)
        count = min(total, self._val_samples)
        samples: list[Sample] = []
        for i in range(count):
            with suppress(BrokenSample):
                samples.append(self._val_sample(self._val_pairs[i * total // count]))
            if samples and (len(samples) == self._val_batch_size or i == count - 1):
                yield collate(samples), len(samples)
                samples = []

    def report_skipped(self, path: Path) -> None:
        _, *others = self._world.gather(self._batches.skipped)
        if self._world.is_first:
            self._batches.write_report(path, others)


# ---------------------------------------------------------------------------------------------- captioned images


def _tokens(tokenizer: Tokenizer, caption: str, seed: int | None = None) -> torch.Tensor:
    return tokenizer.encode([caption], seed=seed, truncate=True)[0]


def captioned_sample(
    pair: Any,
    rng: np.random.Generator,
    size: int | None,
    tokenizer: Tokenizer,
    bpe_dropout: bool,
    caption_dropout: float,
) -> Sample:
    """An image, or its codes, and the tokens of its caption as training sees them."""
    caption = "" if caption_dropout and rng.random() < caption_dropout else pair.caption
    tokens = _tokens(tokenizer, caption, int(rng.integers(MAX_SEED)) if bpe_dropout else None)
    if not isinstance(pair, Pair):
        return {"codes": pair.codes, "text": tokens}
    return {"image": augment_dalle(pair.image, _known(size), rng), "text": tokens}


def captioned_val_sample(pair: Any, size: int | None, tokenizer: Tokenizer) -> Sample:
    tokens = _tokens(tokenizer, pair.caption)
    if not isinstance(pair, Pair):
        return {"codes": pair.codes, "text": tokens}
    return {"image": center_crop_resize(pair.image, _known(size)), "text": tokens}


def _known(size: int | None) -> int:
    """The size that the dVAE wants its images in."""
    if size is None:
        raise ValueError("dvae: expected one to encode the images, got none")
    return size


def check_tokenizer(tokenizer: Tokenizer, model_cfg: CLIPConfig | DALLEConfig) -> None:
    for name, got in (("text_vocab", tokenizer.vocab_size), ("text_len", tokenizer.text_len)):
        if getattr(model_cfg, name) != got:
            raise ValueError(f"{name}: expected the tokenizer's {got}, got {getattr(model_cfg, name)}")
