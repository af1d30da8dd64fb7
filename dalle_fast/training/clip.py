"""Training of CLIP, the reranker: which caption belongs to which image (section 2.6)."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from ..config import CLIPConfig
from ..data.batches import Batch, Corpus
from ..distributed.start import new_model
from ..distributed.world import ALONE, World, join_world
from ..models import CLIP
from ..models.precision import float32_by_default
from ..tokenizer import Tokenizer
from .loop import fit
from .metrics import Metrics
from .settings import TrainCLIP
from .task import CorpusTask, captioned_sample, captioned_val_sample, check_memory, check_tokenizer

VAL_BATCH = 256  # at most so many pairs to choose among in validation


def train_clip(
    pairs: Corpus,
    val_pairs: Corpus | None,
    tokenizer: Tokenizer,
    model_cfg: CLIPConfig,
    train_cfg: TrainCLIP,
    out: str | Path,
    resume: bool = True,
) -> tuple[CLIP, dict[str, float]]:
    """Train the reranker: which caption fits which image. Files, results and errors as in ``loop.fit``."""
    with float32_by_default(), join_world(train_cfg.device, train_cfg.parallel) as world:
        check_memory(CLIP, model_cfg, train_cfg, world)
        task = CLIPTask(pairs, val_pairs, tokenizer, model_cfg, train_cfg, world)
        return fit(task, train_cfg, out, resume, world)


class CLIPTask(CorpusTask):
    """Matching captions and images of a batch; the loss is contrastive among the samples of all processes."""

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
        check_tokenizer(tokenizer, model_cfg)
        if val_pairs is not None and min(len(val_pairs), train_cfg.val_samples) < 2:
            raise ValueError("val: expected 2 samples or more, to tell one from another, got 1")
        size = model_cfg.image_size
        super().__init__(
            pairs,
            val_pairs,
            partial(captioned_sample, tokenizer=tokenizer, bpe_dropout=False, caption_dropout=0.0, size=size),
            partial(captioned_val_sample, tokenizer=tokenizer, size=size),
            train_cfg,
            world,
        )
        # To choose among more pairs is harder: their number must not depend on that of the processes.
        self._val_batch_size = min(train_cfg.batch_size, VAL_BATCH)
        self.model, self.start = new_model(partial(CLIP, model_cfg), train_cfg.seed, world)
        self.model.trained_with = {"tokenizer": tokenizer.fingerprint}

    def loss(self, model: CLIP, batch: Batch, step: int) -> tuple[torch.Tensor, Metrics]:
        return model.loss(batch["image"], batch["text"], self._world.gather_batch)

    def evaluate(self, model: CLIP, batch: Batch) -> Metrics:
        loss, metrics = model.loss(batch["image"], batch["text"])
        return {"loss": loss, **metrics}
