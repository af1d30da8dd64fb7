"""Captioned images: where they come from, what training sees of them, batches by step number."""

from .augment import augment_dalle, augment_dvae, center_crop_resize
from .encoded import EncodedPair, EncodedPairs, write_encoded
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
    "open_pairs",
    "write_encoded",
]
