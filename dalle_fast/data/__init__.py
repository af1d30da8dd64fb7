"""Captioned images: sources, augmentation, batches by step number, and the curation of collections.

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
    from .dedup import Embedding as Embedding
    from .dedup import drop_duplicates as drop_duplicates
    from .dedup import embed_pairs as embed_pairs
    from .encode import Encoding as Encoding
    from .encode import encode_pairs as encode_pairs
    from .filter import filter_pairs as filter_pairs
    from .open import open_pairs as open_pairs
    from .pairs import BrokenSample as BrokenSample
    from .pairs import Pair as Pair
    from .pairs import Pairs as Pairs
    from .pairs import Skipped as Skipped
    from .shard_job import JobOptions as JobOptions

attach(
    __name__,
    {
        "augment_dalle": "augment",
        "augment_dvae": "augment",
        "center_crop_resize": "augment",
        "Batches": "batches",
        "collate": "batches",
        "EncodedPair": "codes",
        "EncodedPairs": "codes",
        "Embedding": "dedup",
        "drop_duplicates": "dedup",
        "embed_pairs": "dedup",
        "Encoding": "encode",
        "encode_pairs": "encode",
        "filter_pairs": "filter",
        "open_pairs": "open",
        "BrokenSample": "pairs",
        "Pair": "pairs",
        "Pairs": "pairs",
        "Skipped": "pairs",
        "JobOptions": "shard_job",
    },
)
