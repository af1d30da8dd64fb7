"""What each of the four trainings learns from: batches, loss and validation of the tokenizer and the three models."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..config import CLIPConfig, DALLEConfig, DVAEConfig
from ..data import (
    Batches,
    BrokenSample,
    Pair,
    augment_dalle,
    augment_dvae,
    center_crop_resize,
    collate,
)
from ..data.loader import Corpus
from ..distributed.start import Start, new_model
from ..distributed.world import ALONE, World, join_world
from ..models import CLIP, DALLE, DiscreteVAE
from ..models.dvae import PIXEL_MARGIN
from ..models.precision import GradientScales, LossScale, Precision, Scales, dtype_of
from ..models.transformer import TEXT_WEIGHT
from ..tokenizer import Tokenizer
from .config import TrainCLIP, TrainConfig, TrainDALLE, TrainDVAE
from .loop import Batch, fit
from .memory import available_memory
from .metrics import Metrics
from .plan import plan_run, refuse_what_cannot_fit

Sample = dict[str, Any]
MAX_SEED = 2**63
INIT_IMAGES = 256  # whose patches the codes may start at
CLIP_VAL_BATCH = 256  # pairs among which CLIP chooses in validation, at most


def train_tokenizer(
    captions: Iterable[str], out: str | Path, vocab_size: int = 16384, text_len: int = 256
) -> Tokenizer:
    """Learn the vocabulary from captions and write it to ``out/tokenizer.json``."""
    tokenizer = Tokenizer.train(captions, vocab_size, text_len)
    Path(out).mkdir(parents=True, exist_ok=True)
    tokenizer.save(Path(out) / "tokenizer.json")
    return tokenizer


def train_dvae(
    pairs: Corpus,
    val_pairs: Corpus | None,
    model_cfg: DVAEConfig,
    train_cfg: TrainDVAE,
    out: str | Path,
    resume: bool = True,
) -> tuple[DiscreteVAE, dict[str, float]]:
    """Stage 1: learn image codes from the images of ``pairs``. Files, results and errors as in ``loop.fit``."""
    with join_world(train_cfg.device, train_cfg.parallel) as world:
        check_memory(DiscreteVAE, model_cfg, train_cfg, world)
        task = DVAETask(pairs, val_pairs, model_cfg, train_cfg, world)
        return fit(task, train_cfg, out, resume, world)


def train_clip(
    pairs: Corpus,
    val_pairs: Corpus | None,
    tokenizer: Tokenizer,
    model_cfg: CLIPConfig,
    train_cfg: TrainCLIP,
    out: str | Path,
    resume: bool = True,
) -> tuple[CLIP, dict[str, float]]:
    """The reranker: learn which caption fits which image. Files, results and errors as in ``loop.fit``."""
    with join_world(train_cfg.device, train_cfg.parallel) as world:
        check_memory(CLIP, model_cfg, train_cfg, world)
        task = CLIPTask(pairs, val_pairs, tokenizer, model_cfg, train_cfg, world)
        return fit(task, train_cfg, out, resume, world)


def train_dalle(
    pairs: Corpus,
    val_pairs: Corpus | None,
    tokenizer: Tokenizer,
    model_cfg: DALLEConfig,
    train_cfg: TrainDALLE,
    out: str | Path,
    dvae: DiscreteVAE | None = None,
    resume: bool = True,
) -> tuple[DALLE, dict[str, float]]:
    """Stage 2: learn captions and image codes. ``pairs`` hold images, which ``dvae`` encodes as they come, or codes.

    Files, results and errors as in ``loop.fit``.
    """
    with join_world(train_cfg.device, train_cfg.parallel) as world:
        check_memory(DALLE, model_cfg, train_cfg, world)
        task = DALLETask(pairs, val_pairs, tokenizer, model_cfg, train_cfg, dvae, world)
        return fit(task, train_cfg, out, resume, world)


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


# ---------------------------------------------------------------------------------------------- dVAE


def _dvae_sample(pair: Pair, rng: np.random.Generator, size: int) -> Sample:
    return {"image": augment_dvae(pair.image, size, rng)}


def _dvae_val_sample(pair: Pair, size: int) -> Sample:
    return {"image": center_crop_resize(pair.image, size)}


def with_grain(images: torch.Tensor, std: float, seed: int) -> torch.Tensor:
    """Images with gaussian noise on every value, within what ``map_pixels`` keeps inside (0, 1)."""
    noise = torch.empty_like(images).normal_(generator=torch.Generator(images.device).manual_seed(seed))
    return (images + std * noise).clamp(-PIXEL_MARGIN, 1 + PIXEL_MARGIN)


class DVAETask(CorpusTask):
    """Images to codes and back. ``loss`` is the negative evidence lower bound."""

    kind = "dvae"

    def __init__(
        self,
        pairs: Corpus,
        val_pairs: Corpus | None,
        model_cfg: DVAEConfig,
        train_cfg: TrainDVAE,
        world: World = ALONE,
    ) -> None:
        size = model_cfg.image_size
        sample = partial(_dvae_sample, size=size)
        super().__init__(pairs, val_pairs, sample, partial(_dvae_val_sample, size=size), train_cfg, world)
        self.config = train_cfg
        # Small enough for every process to have all of it, which ``init_codes`` needs.
        self.model, _ = new_model(partial(DiscreteVAE, model_cfg), train_cfg.seed)
        if train_cfg.init_codes:
            steps = range(-(-INIT_IMAGES // train_cfg.batch_size))
            whole = Batches(pairs, train_cfg.batch_size, sample, train_cfg.seed)  # every process must start alike
            images = torch.cat([whole.batch_at(step)["image"] for step in steps])
            self.model.init_codes(images, seed=train_cfg.seed)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # twice as fast on a CPU
        self._loss_scale: LossScale | None = None
        self._dtype = dtype_of(train_cfg.conv_dtype, train_cfg.device)
        if self._dtype == torch.float16:
            self._loss_scale = self.scales = LossScale(train_cfg.device)

    def loss(self, model: DiscreteVAE, batch: Batch, step: int) -> tuple[torch.Tensor, Metrics]:
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        key = (self.config.seed, step, *([self._world.rank] if self._world.rank else []))  # other noise in each process
        seed = int(np.random.default_rng(key).integers(MAX_SEED))
        if self.config.grain:
            images = with_grain(images, self.config.grain, seed)
        loss, metrics = model.loss(images, self.config.tau_at(step), self.config.beta_at(step), seed, self._dtype)
        return (self._loss_scale.multiply(loss) if self._loss_scale else loss), metrics

    def evaluate(self, model: DiscreteVAE, batch: Batch) -> Metrics:
        """The loss at the final temperature and KL weight; error and code use without noise, as stage 2 sees them.

        All in float32, as the exported model computes.
        """
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        loss, metrics = model.loss(images, self.config.tau_end, self.config.beta_end, seed=0)
        codes = model.encode(images)
        return {
            "loss": loss,
            "nll": metrics["nll"],
            "kl": metrics["kl"],
            "mse": (model.decode(codes) - images).square().mean(),
            "code_counts": torch.bincount(codes.flatten(), minlength=model.cfg.vocab_size),
        }


# ---------------------------------------------------------------------------------------------- captioned images


def _tokens(tokenizer: Tokenizer, caption: str, seed: int | None = None) -> torch.Tensor:
    return tokenizer.encode([caption], seed=seed, truncate=True)[0]


def _captioned_sample(
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


def _captioned_val_sample(pair: Any, size: int | None, tokenizer: Tokenizer) -> Sample:
    tokens = _tokens(tokenizer, pair.caption)
    if not isinstance(pair, Pair):
        return {"codes": pair.codes, "text": tokens}
    return {"image": center_crop_resize(pair.image, _known(size)), "text": tokens}


def _known(size: int | None) -> int:
    """The size that the dVAE wants its images in."""
    if size is None:
        raise ValueError("dvae: expected one to encode the images, got none")
    return size


def _check_tokenizer(tokenizer: Tokenizer, model_cfg: CLIPConfig | DALLEConfig) -> None:
    for name, got in (("text_vocab", tokenizer.vocab_size), ("text_len", tokenizer.text_len)):
        if getattr(model_cfg, name) != got:
            raise ValueError(f"{name}: expected the tokenizer's {got}, got {getattr(model_cfg, name)}")


class CLIPTask(CorpusTask):
    """Which caption belongs to which image of a batch. ``loss`` is contrastive, among the samples of all processes."""

    kind = "clip"

    def __init__(
        self,
        pairs: Corpus,
        val_pairs: Corpus | None,
        tokenizer: Tokenizer,
        model_cfg: CLIPConfig,
        train_cfg: TrainCLIP,
        world: World = ALONE,
    ) -> None:
        _check_tokenizer(tokenizer, model_cfg)
        size = model_cfg.image_size
        super().__init__(
            pairs,
            val_pairs,
            partial(_captioned_sample, size=size, tokenizer=tokenizer, bpe_dropout=False, caption_dropout=0.0),
            partial(_captioned_val_sample, size=size, tokenizer=tokenizer),
            train_cfg,
            world,
        )
        # Choosing among more is harder: the number must not depend on that of the processes.
        self._val_batch_size = min(train_cfg.batch_size, CLIP_VAL_BATCH)
        self.model, self.start = new_model(partial(CLIP, model_cfg), train_cfg.seed, world)

    def loss(self, model: CLIP, batch: Batch, step: int) -> tuple[torch.Tensor, Metrics]:
        return model.loss(batch["image"], batch["text"], self._world.gather_batch)

    def evaluate(self, model: CLIP, batch: Batch) -> Metrics:
        loss, metrics = model.loss(batch["image"], batch["text"])
        return {"loss": loss, **metrics}


class DALLETask(CorpusTask):
    """The stream of caption and image codes. ``loss`` is cross-entropy, 1/8 of the text and 7/8 of the image."""

    kind = "dalle"

    def __init__(
        self,
        pairs: Corpus,
        val_pairs: Corpus | None,
        tokenizer: Tokenizer,
        model_cfg: DALLEConfig,
        train_cfg: TrainDALLE,
        dvae: DiscreteVAE | None,
        world: World = ALONE,
    ) -> None:
        _check_tokenizer(tokenizer, model_cfg)
        grid = (model_cfg.height, model_cfg.width)
        if dvae is not None and (*grid, model_cfg.image_vocab) != (dvae.cfg.grid, dvae.cfg.grid, dvae.cfg.vocab_size):
            expected = f"a grid {dvae.cfg.grid} x {dvae.cfg.grid} of {dvae.cfg.vocab_size} codes, as the dvae's"
            raise ValueError(f"dalle: expected {expected}, got {grid[0]} x {grid[1]} of {model_cfg.image_vocab}")
        size = dvae.cfg.image_size if dvae is not None else None
        sample = partial(
            _captioned_sample,
            size=size,
            tokenizer=tokenizer,
            bpe_dropout=train_cfg.bpe_dropout,
            caption_dropout=train_cfg.caption_dropout,
        )
        val_sample = partial(_captioned_val_sample, size=size, tokenizer=tokenizer)
        super().__init__(pairs, val_pairs, sample, val_sample, train_cfg, world)
        self.model, self.start = new_model(partial(DALLE, model_cfg), train_cfg.seed, world)
        dtype = dtype_of(train_cfg.resblock_dtype, train_cfg.device)
        scales = None
        if dtype != torch.float32:
            resblocks = [resblock for _, resblock in self.model.resblocks()]
            self.scales = scales = GradientScales(
                resblocks, world.size, skipping=train_cfg.skip_overflow, device=train_cfg.device
            )
        self._precision = Precision(dtype, train_cfg.recompute, scales)
        self._dvae = dvae
        if dvae is not None:
            dvae.eval().to(memory_format=torch.channels_last).to(train_cfg.device)  # type: ignore[call-overload]

    def _codes(self, batch: Batch) -> torch.Tensor:
        if "codes" in batch:
            return batch["codes"]
        assert self._dvae is not None  # or there would be no image: see _known
        return self._dvae.encode(batch["image"].contiguous(memory_format=torch.channels_last))

    def loss(self, model: DALLE, batch: Batch, step: int) -> tuple[torch.Tensor, Metrics]:
        return self._loss(model, batch, self._precision)

    def evaluate(self, model: DALLE, batch: Batch) -> Metrics:
        loss, metrics = self._loss(model, batch, replace(self._precision, scales=None))
        return {"loss": loss, **metrics}

    def _loss(self, model: DALLE, batch: Batch, precision: Precision) -> tuple[torch.Tensor, Metrics]:
        text_loss, image_loss = model.losses(batch["text"], self._codes(batch), precision)
        loss = TEXT_WEIGHT * text_loss + (1 - TEXT_WEIGHT) * image_loss
        return loss, {"text_loss": text_loss, "image_loss": image_loss}
