"""Captioned images: where they come from, what training sees of them, batches by step number.

Names are loaded when they are first used, so that settings can be read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from .augment import augment_dalle as augment_dalle
    from .augment import augment_dvae as augment_dvae
    from .augment import center_crop_resize as center_crop_resize
    from .batches import Batches as Batches
    from .batches import collate as collate
    from .codes import EncodedPair as EncodedPair
    from .codes import EncodedPairs as EncodedPairs
    from .dedup import drop_duplicates as drop_duplicates
    from .dedup import embed_pairs as embed_pairs
    from .encode import encode_pairs as encode_pairs
    from .filter import filter_pairs as filter_pairs
    from .open import open_pairs as open_pairs
    from .pairs import BrokenSample as BrokenSample
    from .pairs import Pair as Pair
    from .pairs import Pairs as Pairs
    from .pairs import Skipped as Skipped

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "augment_dalle": "augment",
        "augment_dvae": "augment",
        "center_crop_resize": "augment",
        "Batches": "batches",
        "collate": "batches",
        "EncodedPair": "codes",
        "EncodedPairs": "codes",
        "drop_duplicates": "dedup",
        "embed_pairs": "dedup",
        "encode_pairs": "encode",
        "filter_pairs": "filter",
        "open_pairs": "open",
        "BrokenSample": "pairs",
        "Pair": "pairs",
        "Pairs": "pairs",
        "Skipped": "pairs",
    },
)
