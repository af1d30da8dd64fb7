"""Sizes of every model: frozen dataclasses, and presets as data. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class DVAEConfig:
    """Discrete VAE (section 2.1, appendix A.1); the defaults are the release's sizes."""

    image_size: int = 256  # pixels, square
    vocab_size: int = 8192  # codes
    n_hid: int = 256  # width of the first group; group g has n_hid * groups[g]
    n_init: int = 128  # width of the decoder's first convolution, the codebook
    groups: tuple[int, ...] = (1, 2, 4, 8)  # width multiples; a factor 2 of resolution between two groups
    n_blk_per_group: int = 2
    gain: float | None = None  # of a resblock's branch; None: 1 / n_layers^2, which a short training cannot outgrow

    def __post_init__(self) -> None:
        if not self.groups or self.image_size % self.downsampling:
            raise ValueError(f"image_size: expected a multiple of {self.downsampling}, got {self.image_size}")

    @property
    def branch_gain(self) -> float:
        """What a resblock's branch is multiplied by."""
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

    text_vocab: int = 16384  # without the padding ids: position i pads with id text_vocab + i
    text_len: int = 256
    image_vocab: int = 8192
    height: int = 32  # image grid, tokens
    width: int = 32
    d_model: int = 3968
    n_layer: int = 64
    head_dim: int = 64
    kernel: int = 11  # edge of the conv mask
    guidance: float = 1.0  # what the pipeline samples with; more needs training with caption dropout

    def __post_init__(self) -> None:
        if self.d_model % self.head_dim:
            raise ValueError(f"d_model: expected a multiple of head_dim {self.head_dim}, got {self.d_model}")

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
    text_vocab: int = 16384  # padding ids follow, as in DALLEConfig
    text_len: int = 256
    text_width: int = 512
    text_layers: int = 12
    head_dim: int = 64
    embed_dim: int = 512

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size: expected a multiple of {self.patch_size}, got {self.image_size}")


@dataclass(frozen=True)
class Config:
    """Everything a text-to-image system is made of."""

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
