"""Models and data small enough for a test to train a few steps."""

import json
import os
import signal
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle_fast.config import CLIPConfig, DALLEConfig, DVAEConfig
from dalle_fast.data.codes import EncodedPair
from dalle_fast.data.pairs import Pair
from dalle_fast.distributed.sharding import local
from dalle_fast.distributed.world import ALONE, World
from dalle_fast.tokenizer import Tokenizer
from dalle_fast.training import TrainCLIP, TrainDALLE, TrainDVAE, TrainingStopped, fit
from dalle_fast.training.checkpoint import RUN_FILE, load_tensors, saved_tensors
from dalle_fast.training.clip import CLIPTask
from dalle_fast.training.dalle import DALLETask
from dalle_fast.training.dvae import DVAETask

DVAE = DVAEConfig(image_size=8, vocab_size=16, n_hid=8, n_init=8, groups=(1, 2), n_blk_per_group=1)
DALLE = DALLEConfig(
    text_vocab=270, text_len=6, image_vocab=16, height=4, width=4, d_model=16, n_layer=2, head_dim=8, kernel=3
)
CLIP = CLIPConfig(
    image_size=8, patch_size=4, vision_width=16, vision_layers=1,
    text_vocab=270, text_len=6, text_width=16, text_layers=1, head_dim=8, embed_dim=8,
)  # fmt: skip
KINDS = ("dvae", "clip", "dalle")


def pairs(n: int = 10, seed: int = 0) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [Pair(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8), f"picture {i}") for i in range(n)]


def codes(n: int = 10, seed: int = 0) -> list[EncodedPair]:
    rng = np.random.default_rng(seed)
    return [EncodedPair(rng.integers(0, 16, (4, 4)), f"picture {i}") for i in range(n)]


def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"picture {i}" for i in range(10)], vocab_size=270, text_len=6)


def settings(kind: str, **changes):
    """Training settings with logs, validations and plateaus within a few steps."""
    values = {"steps": 7, "batch_size": 4, "lr": 1e-2, "seed": 3, "log_every": 2, "val_every": 3, "save_every": 100}
    values |= {"val_samples": 6, "warmup_steps": 2, "clip_norm": 1.0, "ema_every": 2}
    if kind == "dvae":
        values |= {"lr_steps": 7, "tau_steps": 5, "beta_steps": 3, "init_codes": True, "encoder_lr": 0.5}
    if kind == "dalle":
        values |= {"plateau_window": 1, "plateau_patience": 1, "caption_dropout": 0.3}
    return {"dvae": TrainDVAE, "clip": TrainCLIP, "dalle": TrainDALLE}[kind](**(values | changes))


def task(kind: str, config, world: World = ALONE):
    if kind == "dvae":
        return DVAETask(pairs(), pairs(6, seed=1), DVAE, config, world)
    if kind == "clip":
        return CLIPTask(pairs(), pairs(6, seed=1), tokenizer(), CLIP, config, world)
    return DALLETask(codes(), codes(6, seed=1), tokenizer(), DALLE, config, None, world)


def checkpoint(out: Path, kind: str) -> dict:
    """The values and the tensors of the newest complete checkpoint."""
    path = max((out / kind / "checkpoints").glob("step-*[0-9]"))
    tensors = {name: torch.empty_like(t, device="cpu") for name, t in saved_tensors(path).items()}
    load_tensors(path, tensors)
    values = json.loads((path / RUN_FILE).read_text())
    return {name: value for name, value in values.items() if name not in ("checksum", "files")} | tensors


def part(content: dict, name: str) -> dict:
    """The tensors of one part of a checkpoint: model, average or optimizer."""
    return {key.partition("/")[2]: value for key, value in content.items() if key.startswith(f"{name}/")}


def same(a: object, b: object) -> bool:
    """Bitwise equality of nested checkpoints."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return a == b


class Memory(TorchDispatchMode):
    """Bytes of the tensors that are made within and still there, and the most that there were.

    Args:
        device: where; None is anywhere.
        known: tensors whose memory is not counted.
    """

    def __init__(self, device: str | None = None, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device = device
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or self._device not in (None, tensor.device.type):
                continue
            storage = local(tensor).untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.now -= size


def records(out: Path, kind: str) -> list[dict]:
    return [json.loads(line) for line in (out / kind / "log.jsonl").read_text().splitlines()]


def timeless(out: Path, kind: str) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records(out, kind)]


def state_of(out: Path, kind: str) -> dict:
    return {name: value for name, value in checkpoint(out, kind).items() if name != "seconds"}


def stop_after(step: int, stopped_task, config, out: Path, signum: int = signal.SIGINT) -> TrainingStopped:
    """Train and send a signal during a step."""
    loss = stopped_task.loss

    def loss_and_signal(model, batch, at):
        if at == step - 1:
            os.kill(os.getpid(), signum)
        return loss(model, batch, at)

    stopped_task.loss = loss_and_signal
    with pytest.raises(TrainingStopped) as stopped:
        fit(stopped_task, config, out)
    return stopped.value
