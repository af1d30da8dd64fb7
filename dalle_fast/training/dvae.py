"""Training of the dVAE: images to codes and back (section 2.1, appendix A)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from ..config import DVAEConfig
from ..data.augment import augment_dvae, center_crop_resize
from ..data.batches import Batch, Batches, Corpus
from ..data.pairs import Pair
from ..distributed.start import new_model
from ..distributed.world import ALONE, World, join_world
from ..models import DiscreteVAE
from ..models.codebook_init import init_codes
from ..models.dvae import PIXEL_MARGIN, count_codes
from ..models.precision import dtype_of, float32_by_default
from .loop import fit
from .metrics import Metrics
from .scales import LossScale
from .settings import TrainDVAE
from .task import MAX_SEED, CorpusTask, Sample, check_memory

INIT_IMAGES = 256  # at least so many images give the patches at which codes start


def train_dvae(
    pairs: Corpus,
    val_pairs: Corpus | None,
    model_cfg: DVAEConfig,
    train_cfg: TrainDVAE,
    out: str | Path,
    resume: bool = True,
) -> tuple[DiscreteVAE, dict[str, float]]:
    """Stage 1: train the dVAE on the images of ``pairs``. Files, results and errors as in ``loop.fit``."""
    with float32_by_default(), join_world(train_cfg.device, train_cfg.parallel) as world:
        check_memory(DiscreteVAE, model_cfg, train_cfg, world)
        task = DVAETask(pairs, val_pairs, model_cfg, train_cfg, world)
        return fit(task, train_cfg, out, resume, world)


def _dvae_sample(pair: Pair, rng: np.random.Generator, size: int) -> Sample:
    return {"image": augment_dvae(pair.image, size, rng)}


def _dvae_val_sample(pair: Pair, size: int) -> Sample:
    return {"image": center_crop_resize(pair.image, size)}


def with_grain(images: torch.Tensor, std: float, seed: int) -> torch.Tensor:
    """Images with gaussian noise on every value, clamped to the range that ``map_pixels`` keeps inside (0, 1)."""
    noise = torch.empty_like(images).normal_(generator=torch.Generator(images.device).manual_seed(seed))
    return (images + std * noise).clamp(-PIXEL_MARGIN, 1 + PIXEL_MARGIN)


class DVAETask(CorpusTask):
    """Images to codes and back; the loss is the negative evidence lower bound."""

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
        # Small enough for every process to hold the whole model, which ``init_codes`` needs.
        self.model, _ = new_model(partial(DiscreteVAE, model_cfg), train_cfg.seed)
        if train_cfg.init_codes:
            steps = range(-(-INIT_IMAGES // train_cfg.batch_size))
            whole = Batches(pairs, train_cfg.batch_size, sample, train_cfg.seed)  # the same in every process
            images = torch.cat([whole.batch_at(step)["image"] for step in steps])
            init_codes(self.model, images, seed=train_cfg.seed)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # twice as fast on a CPU
        self._loss_scale: LossScale | None = None
        self._dtype = dtype_of(train_cfg.conv_dtype, train_cfg.device)
        if self._dtype == torch.float16:
            self._loss_scale = self.scales = LossScale(train_cfg.device)

    def loss(self, model: DiscreteVAE, batch: Batch, step: int) -> tuple[torch.Tensor, Metrics]:
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        rank = [self._world.rank] if self._world.rank else []  # every process draws noise of its own
        part = [MAX_SEED, batch["part"]] if "part" in batch else []  # and every part of a batch
        key = (self.config.seed, step, *rank, *part)
        seed = int(np.random.default_rng(key).integers(MAX_SEED))
        if self.config.grain:
            images = with_grain(images, self.config.grain, seed)
        tau, beta = self.config.tau_at(step), self.config.beta_at(step)
        on_device = torch.full((), seed, device=images.device)  # to copy it there would wait for the device
        loss, metrics = model.loss(images, tau, beta, on_device, self._dtype)
        return (self._loss_scale.multiply(loss) if self._loss_scale else loss), metrics

    def evaluate(self, model: DiscreteVAE, batch: Batch) -> Metrics:
        """The loss at the final temperature and KL weight; error and use of codes without noise, as in stage 2.

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
            "code_counts": count_codes(codes, model.cfg.vocab_size),
        }
