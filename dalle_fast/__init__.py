"""DALL-E (2021): text in, reranked pictures out.

Public names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Where each public name lives; a module stands for itself.
_HOMES = {
    "AttentionMask": "mask",
    "layer_masks": "mask",
    "minifloat": "minifloat",
    "reference": "reference",
    "backend": "ops",
    "sparse_attention": "ops",
    "decode_attention": "ops",
    "sample": "ops",
    "gumbel_softmax": "ops",
    "gumbel_quantize": "ops",
    "residual_layer_norm": "ops",
    "scale_gradient": "ops",
    "unscale_gradient": "ops",
    "initial_scales": "ops",
    "update_scales": "ops",
    "PackedWeight": "ops",
    "pack_linear": "ops",
    "packed_linear": "ops",
    "adamw16": "ops",
    "gradient_norm": "ops",
    "PRESETS": "config",
    "Tokenizer": "tokenizer",
    "DiscreteVAE": "models",
    "DALLE": "models",
    "CLIP": "models",
    "load_model": "models",
    "save_model": "models",
    "AdamW16": "training",
    "TextToImage": "pipeline",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOMES[name]}", __name__)
    value = module if name == _HOMES[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
