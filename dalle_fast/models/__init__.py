"""The three models: ``DiscreteVAE``, ``DALLE``, ``CLIP``."""

from .clip import CLIP
from .dvae import DiscreteVAE
from .saving import KINDS, hash_of, kind_of, load_model, save_model
from .transformer import DALLE

__all__ = ["CLIP", "DALLE", "KINDS", "DiscreteVAE", "hash_of", "kind_of", "load_model", "save_model"]
