"""The ops: public function, fake and gradient of each. The kernels are in ``csrc/``."""

from ._library import Backend, backend, waits_on_host
from .adamw16 import adamw16, gradient_norm
from .decode_attention import decode_attention
from .gumbel import gumbel_quantize, gumbel_softmax
from .packed_linear import PackedWeight, pack_linear, packed_linear
from .resblock import initial_scales, residual_layer_norm, scale_gradient, unscale_gradient, update_scales
from .sample import sample
from .sparse_attention import sparse_attention

__all__ = [
    "Backend",
    "PackedWeight",
    "adamw16",
    "backend",
    "decode_attention",
    "gradient_norm",
    "gumbel_quantize",
    "gumbel_softmax",
    "initial_scales",
    "pack_linear",
    "packed_linear",
    "residual_layer_norm",
    "sample",
    "scale_gradient",
    "sparse_attention",
    "unscale_gradient",
    "update_scales",
    "waits_on_host",
]
