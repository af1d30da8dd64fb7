"""The data side of the three trainings, the checks before them, and the training of the tokenizer.

A task pairs a model with its data: dvae.py, clip.py and dalle.py have one each, with loss and validation, and loop.py
trains any of them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ..config import CLIPConfig, DALLEConfig
from ..data.augment import augment_dalle, center_crop_resize
from ..data.batches import Batch, Batches, Corpus, collate
from ..data.codes import EncodedPairs
from ..data.pairs import BrokenSample, Pair, Pairs, Skipped
from ..data.sources.view import fingerprint_of
from ..distributed.start import Start
from ..distributed.world import ALONE, World
from ..models.base import TrainableModel
from ..tokenizer import Tokenizer
from .plan import available_memory, plan_run, refuse_what_cannot_fit
from .scales import Scales
from .settings import TrainCLIP, TrainConfig

Sample = dict[str, Any]
MAX_SEED = 2**63  # exclusive


def train_tokenizer(
    captions: Iterable[str], out: str | Path, vocab_size: int = 16384, text_len: int = 256
) -> Tokenizer:
    """Learn the vocabulary from captions and write it to ``out/tokenizer.json``.

    Args:
        vocab_size: text tokens, the 256 bytes included.
        text_len: tokens per caption, padding included.

    Raises:
        ValueError: there is another tokenizer, which models in the folder were trained with.
    """
    out = Path(out)
    tokenizer, path = Tokenizer.train(captions, vocab_size, text_len), out / "tokenizer.json"
    # A folder of that name has the checkpoints of a training.
    users = [name for name in ("dalle.safetensors", "clip.safetensors", "dalle", "clip") if (out / name).exists()]
    if path.exists() and users and Tokenizer.load(path).fingerprint != tokenizer.fingerprint:
        got = "another that would replace it"
        raise ValueError(f"tokenizer: expected the one in {out}, which {', '.join(users)} depend on, got {got}")
    tokenizer.save(path)
    return tokenizer


def check_memory(
    model_class: Callable[[Any], TrainableModel], model_cfg: Any, train_cfg: TrainConfig, world: World = ALONE
) -> None:
    """Print the memory that a training needs to stderr, before it allocates any.

    Raises:
        ValueError: the device has less; the message names what would fit. Or the processes cannot share the parts of a
            batch.
    """
    if train_cfg.batch_size % (world.size * train_cfg.accumulate):
        expected = f"a multiple of {world.size} processes with {train_cfg.accumulate} parts each"
        raise ValueError(f"batch_size: expected {expected}, got {train_cfg.batch_size}")
    with torch.device("meta"):
        model = model_class(model_cfg)
    available = available_memory(torch.device(train_cfg.device))
    plan = plan_run(model, model_cfg, train_cfg, available, world.shards, world.size)
    accumulate = None if isinstance(train_cfg, TrainCLIP) else train_cfg.accumulate
    refuse_what_cannot_fit(plan, train_cfg.batch_size, world.size, accumulate)
    if world.is_first:
        print(plan, file=sys.stderr)


def describe_corpus(pairs: Corpus) -> str:
    """Number of pairs and, if they have names, a hash of names and captions spread over them: to tell corpora apart."""
    if isinstance(pairs, EncodedPairs):
        return f"{len(pairs)} codes of {pairs.source} by dVAE {pairs.fingerprint}, draws {pairs.draws}"
    named = hasattr(pairs, "name") and hasattr(pairs, "caption")
    return f"{len(pairs)} pairs" + (f" of hash {fingerprint_of(cast(Pairs, pairs))}" if named else "")


class CorpusTask:
    """The data side of a task.

    Args:
        pairs: training data.
        val_pairs: held-out data, if any.
        sample: makes a training sample of a pair, with all randomness from the generator.
        val_sample: makes a validation sample of a pair.
        config: settings of the training.
        world: the processes that share each batch.
    """

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
        self.corpus = describe_corpus(pairs)
        self._val_pairs = val_pairs
        self._val_sample = val_sample
        self._val_samples = config.val_samples
        self._val_batch_size = config.batch_size // world.size
        self._val_skipped: Counter[Skipped] = Counter()
        self._check_validation()

    def batches(self, start: int) -> Iterator[Batch]:
        return self._batches.iterate(start)

    def validation(self) -> Iterator[tuple[Batch, int]]:
        """Batches of held-out samples, spread evenly over their corpus; broken ones are skipped and reported."""
        samples: list[Sample] = []
        for sample in self._read_validation(self._val_skipped):
            samples.append(sample)
            if len(samples) == self._val_batch_size:
                yield collate(samples), len(samples)
                samples = []
        if samples:
            yield collate(samples), len(samples)

    def _read_validation(self, skipped: Counter[Skipped]) -> Iterator[Sample]:
        pairs = self._val_pairs if self._val_pairs is not None else ()
        count = min(len(pairs), self._val_samples)
        for i in range(count):
            try:
                yield self._val_sample(pairs[i * len(pairs) // count])
            except BrokenSample as error:
                skipped[Skipped(error.name, error.reason)] += 1

    def _check_validation(self) -> None:
        """Raise ValueError if none of the held-out samples can be read: before the first step, not long after it."""
        skipped: Counter[Skipped] = Counter()
        if self._val_pairs is None or any(True for _ in self._read_validation(skipped)):
            return
        name, reason = next(iter(skipped), ("", "no pairs"))
        raise ValueError(f"val: expected readable samples, got {skipped.total()} broken ones, such as {name}: {reason}")

    def continue_report(self, path: Path) -> None:
        if self._world.is_first:
            self._batches.continue_report(path)

    def report_skipped(self, path: Path) -> None:
        _, *others = self._world.gather(self._batches.skipped)
        if self._world.is_first:  # every process reads all held-out samples
            self._batches.write_report(path, [*others, self._val_skipped])


# ---------------------------------------------------------------------------------------------- captioned samples


def captioned_sample(
    pair: Any,
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    bpe_dropout: bool,
    caption_dropout: float,
    size: int | None = None,
    grid: tuple[int, int, int] | None = None,
) -> Sample:
    """Training sample of a caption with an image or its codes.

    Args:
        pair: a ``Pair`` or an ``EncodedPair``.
        rng: source of all randomness.
        bpe_dropout: whether the caption is tokenized at random.
        caption_dropout: share of captions replaced by the empty one.
        size: edge of images in pixels; None if images cannot be used.
        grid: height, width and vocabulary of codes; None if codes cannot be used.

    Returns:
        ``text``, int64 [text_len], and ``image``, uint8 [size, size, 3], or ``codes``, int64 [height, width].
    """
    caption = "" if caption_dropout and rng.random() < caption_dropout else pair.caption
    seed = int(rng.integers(MAX_SEED)) if bpe_dropout else None
    text = tokenizer.encode([caption], seed=seed, truncate=True)[0]
    if isinstance(pair, Pair):
        return {"image": augment_dalle(pair.image, _checked_size(size), rng), "text": text}
    return {"codes": _checked_codes(pair.codes, grid), "text": text}


def captioned_val_sample(
    pair: Any, tokenizer: Tokenizer, size: int | None = None, grid: tuple[int, int, int] | None = None
) -> Sample:
    """Validation sample of a caption with an image or its codes; as ``captioned_sample`` without randomness."""
    text = tokenizer.encode([pair.caption], truncate=True)[0]
    if isinstance(pair, Pair):
        return {"image": center_crop_resize(pair.image, _checked_size(size)), "text": text}
    return {"codes": _checked_codes(pair.codes, grid), "text": text}


def _checked_size(size: int | None) -> int:
    if size is None:
        raise ValueError("dvae: expected one to encode the images, got none")
    return size


def _checked_codes(codes: np.ndarray, grid: tuple[int, int, int] | None) -> np.ndarray:
    """The codes, if the model can read them: checked here, on the CPU, as on a GPU their values would cost a wait."""
    if grid is None:
        raise ValueError("pairs: expected images, got codes")
    height, width, vocab = grid
    if codes.shape != (height, width) or not 0 <= codes.min() <= codes.max() < vocab:
        got = f"{list(codes.shape)}, {codes.min()} to {codes.max()}" if codes.size else list(codes.shape)
        raise ValueError(f"codes: expected [{height}, {width}] with values in [0, {vocab}), got {got}")
    return codes


def check_tokenizer(tokenizer: Tokenizer, model_cfg: CLIPConfig | DALLEConfig) -> None:
    """Raise ValueError unless the model reads the tokenizer's tokens, so that these need no check later."""
    for name, got in (("text_vocab", tokenizer.vocab_size), ("text_len", tokenizer.text_len)):
        if getattr(model_cfg, name) != got:
            raise ValueError(f"{name}: expected the tokenizer's {got}, got {getattr(model_cfg, name)}")
