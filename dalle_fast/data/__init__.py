"""Captioned images: where they come from, what training sees of them, batches by step number."""

from .augment import augment_dalle, augment_dvae, center_crop_resize
from .curate import filter_pairs
from .duplicates import drop_duplicates, embed_pairs
from .encoded import EncodedPair, EncodedPairs
from .encoding import encode_pairs
from .loader import Batches, collate
from .pairs import BrokenSample, Pair, Pairs, Skipped, open_pairs

__all__ = [
    "Batches",
    "BrokenSample",
    "EncodedPair",
    "EncodedPairs",
    "Pair",
    "Pairs",
    "Skipped",
    "augment_dalle",
    "augment_dvae",
    "center_crop_resize",
    "collate",
    "drop_duplicates",
    "embed_pairs",
    "encode_pairs",
    "filter_pairs",
    "open_pairs",
]
