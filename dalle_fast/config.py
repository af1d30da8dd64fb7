"""Sizes of every model, presets of them, and options of sampling: frozen dataclasses. Nothing here imports torch."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from typing import Any

LARGEST = 2**31 - 1  # of any size; kernels count in 32 bits
LARGEST_EDGE = 2**14  # of an image, in pixels


def _check_sizes(cfg: Any) -> None:
    """Raise ValueError unless every ``int`` field of a config is an integer from 1 to LARGEST."""
    for item in fields(cfg):
        if item.type == "int":
            _check_size(item.name, getattr(cfg, item.name))


def _check_size(name: str, value: Any, largest: int = LARGEST) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise ValueError(f"{name}: expected an integer from 1 to {largest}, got {_shown(value)}")


def _is_finite(value: Any) -> bool:
    """A number that a float can hold; an int may be beyond."""
    largest = sys.float_info.max
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -largest <= value <= largest


def _check_number(name: str, value: Any) -> None:
    if not _is_finite(value):
        raise ValueError(f"{name}: expected a finite number, got {_shown(value)}")


def _check_multiple(name: str, value: int, of: str, unit: int) -> None:
    if value % unit:
        raise ValueError(f"{name}: expected a multiple of {unit} ({of}), got {value}")


def _shown(value: Any) -> str:
    """The value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


@dataclass(frozen=True)
class DVAEConfig:
    """Discrete VAE (section 2.1, appendix A.1); the defaults are the release's sizes."""

    image_size: int = 256  # pixels, square
    vocab_size: int = 8192  # codes
    n_hid: int = 256  # width of the first group; group g has n_hid * groups[g]
    n_init: int = 128  # width of the decoder's first convolution, the codebook
    groups: tuple[int, ...] = (1, 2, 4, 8)  # width multiples; the resolution changes by 2 between two groups
    n_blk_per_group: int = 2
    gain: float | None = None  # factor on a resblock's branch; None: 1 / n_layers^2, too small for a short training

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_size("image_size", self.image_size, largest=LARGEST_EDGE)
        if not isinstance(self.groups, tuple) or not 1 <= len(self.groups) <= 15:
            raise ValueError(f"groups: expected a tuple of 1 to 15 width multiples, got {_shown(self.groups)}")
        for multiple in self.groups:
            _check_size("groups", multiple)
        if self.n_hid * min(self.groups) < 4:
            raise ValueError(f"n_hid: expected groups of width 4 or more, got {self.n_hid} * {min(self.groups)}")
        if self.gain is not None:
            _check_number("gain", self.gain)
        if self.image_size % self.downsampling:
            raise ValueError(f"image_size: expected a multiple of {self.downsampling}, got {self.image_size}")

    @property
    def branch_gain(self) -> float:
        """Factor on a resblock's branch."""
        return (len(self.groups) * self.n_blk_per_group) ** -2.0 if self.gain is None else self.gain

    @property
    def downsampling(self) -> int:
        """Pixels along the edge of one code."""
        return 2 ** (len(self.groups) - 1)

    @property
    def grid(self) -> int:
        """Codes along the edge of an image."""
        return self.image_size // self.downsampling


@dataclass(frozen=True)
class DALLEConfig:
    """Sparse transformer over one stream of text and image tokens (section 2.2, appendix B.1)."""

    text_vocab: int = 16384  # text tokens, without the padding ids: position i pads with id text_vocab + i
    text_len: int = 256  # tokens of a caption, padding included
    image_vocab: int = 8192  # codes
    height: int = 32  # of the image grid, in codes
    width: int = 32
    d_model: int = 3968
    n_layer: int = 64
    head_dim: int = 64
    kernel: int = 11  # edge of the conv mask, in codes
    guidance: float = 1.0  # default weight of the caption in sampling; above 1 needs training with caption dropout

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_size("kernel", self.kernel, largest=LARGEST_EDGE)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd number, got {self.kernel}")
        _check_number("guidance", self.guidance)
        _check_multiple("d_model", self.d_model, "head_dim", self.head_dim)

    @property
    def n_head(self) -> int:
        return self.d_model // self.head_dim

    @property
    def image_len(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class CLIPConfig:
    """Contrastive reranker: the ViT variant of the CLIP paper (arXiv 2103.00020); the defaults are ViT-B/32's."""

    image_size: int = 224
    patch_size: int = 32
    vision_width: int = 768
    vision_layers: int = 12
    text_vocab: int = 16384  # without the padding ids, as in DALLEConfig
    text_len: int = 256
    text_width: int = 512
    text_layers: int = 12
    head_dim: int = 64
    embed_dim: int = 512

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_size("image_size", self.image_size, largest=LARGEST_EDGE)
        _check_multiple("image_size", self.image_size, "patch_size", self.patch_size)
        _check_multiple("vision_width", self.vision_width, "head_dim", self.head_dim)
        _check_multiple("text_width", self.text_width, "head_dim", self.head_dim)


@dataclass(frozen=True)
class Sampling:
    """Options of sampling the codes of images; the defaults leave the model's distributions as they are.

    Raises:
        ValueError: an option that no sampling can be done with.
    """

    temperature: float = 1.0  # Divides the logits: below 1 favours likely codes, above 1 adds variety.
    top_k: int | None = None  # Draw each code from the k likeliest; none draws from all.
    top_p: float | None = None  # Draw each code from the likeliest that reach this probability; none draws from all.
    guidance: float | None = None  # Weight of the caption; 1 is no guidance, none is the model's own weight.
    seed: int = 0  # The same seed gives the same images.

    def __post_init__(self) -> None:
        if not (_is_finite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature: expected a finite number above 0, got {_shown(self.temperature)}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: expected 1 or more, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a share in (0, 1], got {self.top_p}")
        if self.guidance is not None and not _is_finite(self.guidance):
            raise ValueError(f"guidance: expected a finite number, got {_shown(self.guidance)}")
        if not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: expected an integer of 64 bits, got {self.seed!r}")


@dataclass(frozen=True)
class Config:
    """Sizes of the models of a text-to-image system."""

    dvae: DVAEConfig = field(default_factory=DVAEConfig)
    dalle: DALLEConfig = field(default_factory=DALLEConfig)
    clip: CLIPConfig = field(default_factory=CLIPConfig)


PRESETS: dict[str, Config] = {
    "tiny": Config(
        dvae=DVAEConfig(
            image_size=32, vocab_size=128, n_hid=32, n_init=32, groups=(1, 2, 4), n_blk_per_group=1, gain=1.0
        ),
        dalle=DALLEConfig(
            text_vocab=512, text_len=16, image_vocab=128, height=8, width=8, d_model=192, n_layer=4, head_dim=32,
            guidance=2.0,
        ),
        clip=CLIPConfig(
            image_size=32, patch_size=8, vision_width=128, vision_layers=4,
            text_vocab=512, text_len=16, text_width=128, text_layers=3, head_dim=32, embed_dim=64,
        ),
    ),
    "1.2B": Config(dalle=DALLEConfig(d_model=1216)),
    "2.8B": Config(dalle=DALLEConfig(d_model=1920)),
    "5.6B": Config(dalle=DALLEConfig(d_model=2688)),
    "12B": Config(dalle=DALLEConfig(d_model=3968)),
}  # fmt: skip
