"""Training of the tokenizer and the three models. Names are loaded when they are first used, so that settings can be
read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from .clip import train_clip as train_clip
    from .dalle import train_dalle as train_dalle
    from .dvae import train_dvae as train_dvae
    from .loop import fit as fit
    from .optimizer import AdamW16 as AdamW16
    from .settings import TrainCLIP as TrainCLIP
    from .settings import TrainConfig as TrainConfig
    from .settings import TrainDALLE as TrainDALLE
    from .settings import TrainDVAE as TrainDVAE
    from .stopping import TrainingDiverged as TrainingDiverged
    from .stopping import TrainingStopped as TrainingStopped
    from .task import train_tokenizer as train_tokenizer

attach(
    __name__,
    {
        "train_clip": "clip",
        "train_dalle": "dalle",
        "train_dvae": "dvae",
        "fit": "loop",
        "AdamW16": "optimizer",
        "TrainCLIP": "settings",
        "TrainConfig": "settings",
        "TrainDALLE": "settings",
        "TrainDVAE": "settings",
        "TrainingDiverged": "stopping",
        "TrainingStopped": "stopping",
        "train_tokenizer": "task",
    },
)
