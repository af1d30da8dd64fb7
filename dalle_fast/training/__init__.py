"""Training of the tokenizer and the three models. One loop, one task for each model."""

from .config import TrainCLIP, TrainConfig, TrainDALLE, TrainDVAE
from .loop import TrainingStopped, fit
from .tasks import train_clip, train_dalle, train_dvae, train_tokenizer

__all__ = [
    "TrainCLIP",
    "TrainConfig",
    "TrainDALLE",
    "TrainDVAE",
    "TrainingStopped",
    "fit",
    "train_clip",
    "train_dalle",
    "train_dvae",
    "train_tokenizer",
]
