"""Training of the transformer: one stream of a caption and the codes of its image (section 2.2)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..config import DALLEConfig
from ..data.batches import Batch, Corpus
from ..distributed.start import new_model
from ..distributed.world import ALONE, World, join_world
from ..models import DALLE, DiscreteVAE, hash_of
from ..models.precision import Precision, dtype_of, float32_by_default
from ..tokenizer import Tokenizer
from .loop import fit
from .metrics import Metrics
from .scales import GradientScales
from .settings import TrainDALLE
from .task import CorpusTask, captioned_sample, captioned_val_sample, check_memory, check_tokenizer


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
    """Stage 2: train the transformer on captions and images or codes. Files, results and errors as in ``loop.fit``.

    Args:
        pairs, val_pairs: training and held-out data: images, which ``dvae`` encodes batch by batch, or codes.
        dvae: needed for images only.
    """
    with float32_by_default(), join_world(train_cfg.device, train_cfg.parallel) as world:
        check_memory(DALLE, model_cfg, train_cfg, world)
        task = DALLETask(pairs, val_pairs, tokenizer, model_cfg, train_cfg, dvae, world)
        return fit(task, train_cfg, out, resume, world)


class DALLETask(CorpusTask):
    """One stream of caption and image codes; the loss is cross-entropy, 1/8 of the text and 7/8 of the image."""

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
        check_tokenizer(tokenizer, model_cfg)
        grid = (model_cfg.height, model_cfg.width, model_cfg.image_vocab)
        if dvae is not None and grid != (dvae.cfg.grid, dvae.cfg.grid, dvae.cfg.vocab_size):
            expected = f"a grid {dvae.cfg.grid} x {dvae.cfg.grid} of {dvae.cfg.vocab_size} codes, as the dvae's"
            raise ValueError(f"dalle: expected {expected}, got {grid[0]} x {grid[1]} of {grid[2]}")
        size = dvae.cfg.image_size if dvae is not None else None
        sample = partial(
            captioned_sample,
            tokenizer=tokenizer,
            bpe_dropout=train_cfg.bpe_dropout,
            caption_dropout=train_cfg.caption_dropout,
            size=size,
            grid=grid,
        )
        val_sample = partial(captioned_val_sample, tokenizer=tokenizer, size=size, grid=grid)
        super().__init__(pairs, val_pairs, sample, val_sample, train_cfg, world)
        self.model, self.start = new_model(partial(DALLE, model_cfg), train_cfg.seed, world)
        dtype = dtype_of(train_cfg.resblock_dtype, train_cfg.device)
        scales = None
        if dtype != torch.float32:
            resblocks = [resblock for _, resblock in self.model.resblocks()]
            self.scales = scales = GradientScales(
                resblocks, world.size, skipping=train_cfg.skip_overflow, device=train_cfg.device
            )
        self.model.trained_with = {"tokenizer": tokenizer.fingerprint}
        if dvae is not None:
            self.model.trained_with["dvae"] = hash_of(dvae)
        self._precision = Precision(dtype, train_cfg.recompute, scales)
        self._dvae = dvae
        if dvae is not None:
            dvae.eval().to(memory_format=torch.channels_last).to(train_cfg.device)  # type: ignore[call-overload]

    def _codes(self, batch: Batch) -> torch.Tensor:
        if "codes" in batch:
            return batch["codes"]
        assert self._dvae is not None  # without it there are no images: see captioned_sample
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        return self._dvae.encode(images, check_range=False)  # a check would wait for a GPU

    def loss(self, model: DALLE, batch: Batch, step: int) -> tuple[torch.Tensor, Metrics]:
        return self._loss(model, batch, self._precision)

    def evaluate(self, model: DALLE, batch: Batch) -> Metrics:
        loss, metrics = self._loss(model, batch, replace(self._precision, scales=None))
        return {"loss": loss, **metrics}

    def _loss(self, model: DALLE, batch: Batch, precision: Precision) -> tuple[torch.Tensor, Metrics]:
        return model.loss(batch["text"], self._codes(batch), precision)
