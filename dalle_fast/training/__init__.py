"""Training of the tokenizer and the three models: one loop, one task for each model.

The names are loaded when they are first used, so that settings can be read without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainCLIP, TrainConfig, TrainDALLE, TrainDVAE
    from .errors import TrainingDiverged, TrainingStopped
    from .loop import fit
    from .optimizer import AdamW16
    from .tasks import train_clip, train_dalle, train_dvae, train_tokenizer

_HOMES = {
    "AdamW16": "optimizer",
    "TrainCLIP": "config",
    "TrainConfig": "config",
    "TrainDALLE": "config",
    "TrainDVAE": "config",
    "TrainingDiverged": "errors",
    "TrainingStopped": "errors",
    "fit": "loop",
    "train_clip": "tasks",
    "train_dalle": "tasks",
    "train_dvae": "tasks",
    "train_tokenizer": "tasks",
}

__all__ = [
    "AdamW16",
    "TrainCLIP",
    "TrainConfig",
    "TrainDALLE",
    "TrainDVAE",
    "TrainingDiverged",
    "TrainingStopped",
    "fit",
    "train_clip",
    "train_dalle",
    "train_dvae",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
