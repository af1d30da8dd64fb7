"""DALL-E (2021): text in, reranked pictures out.

Public names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import attach

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import minifloat as minifloat
    from . import reference as reference
    from .config import PRESETS as PRESETS
    from .config import Sampling as Sampling
    from .mask import AttentionMask as AttentionMask
    from .mask import layer_masks as layer_masks
    from .models import CLIP as CLIP
    from .models import DALLE as DALLE
    from .models import DiscreteVAE as DiscreteVAE
    from .models import load_model as load_model
    from .models import save_model as save_model
    from .ops import backend as backend
    from .ops.adamw16 import adamw16 as adamw16
    from .ops.adamw16 import gradient_norm as gradient_norm
    from .ops.decode_attention import decode_attention as decode_attention
    from .ops.gumbel import gumbel_quantize as gumbel_quantize
    from .ops.gumbel import gumbel_softmax as gumbel_softmax
    from .ops.packed_linear import PackedWeight as PackedWeight
    from .ops.packed_linear import pack_linear as pack_linear
    from .ops.packed_linear import packed_linear as packed_linear
    from .ops.resblock import initial_scales as initial_scales
    from .ops.resblock import residual_layer_norm as residual_layer_norm
    from .ops.resblock import scale_gradient as scale_gradient
    from .ops.resblock import unscale_gradient as unscale_gradient
    from .ops.resblock import update_scales as update_scales
    from .ops.sample import sample as sample
    from .ops.sparse_attention import sparse_attention as sparse_attention
    from .pipeline import TextToImage as TextToImage
    from .tokenizer import Tokenizer as Tokenizer
    from .training import AdamW16 as AdamW16

attach(
    __name__,
    {
        "minifloat": "minifloat",
        "reference": "reference",
        "PRESETS": "config",
        "Sampling": "config",
        "AttentionMask": "mask",
        "layer_masks": "mask",
        "CLIP": "models",
        "DALLE": "models",
        "DiscreteVAE": "models",
        "load_model": "models",
        "save_model": "models",
        "PackedWeight": "ops",
        "adamw16": "ops",
        "backend": "ops",
        "decode_attention": "ops",
        "gradient_norm": "ops",
        "gumbel_quantize": "ops",
        "gumbel_softmax": "ops",
        "initial_scales": "ops",
        "pack_linear": "ops",
        "packed_linear": "ops",
        "residual_layer_norm": "ops",
        "sample": "ops",
        "scale_gradient": "ops",
        "sparse_attention": "ops",
        "unscale_gradient": "ops",
        "update_scales": "ops",
        "TextToImage": "pipeline",
        "Tokenizer": "tokenizer",
        "AdamW16": "training",
    },
)
