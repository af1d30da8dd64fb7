"""CLIP: how well an image matches a caption (arXiv 2103.00020), to rerank samples (section 2.6).

Two transformer towers into one space, trained contrastively. Parameter names are those of openai/CLIP:
``visual.conv1``, ``transformer.resblocks.0.attn.in_proj_weight``, ``text_projection``, ``logit_scale``, ...
Text comes from this project's tokenizer, so a caption ends at its first padding token, where its feature is read.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..config import CLIPConfig
from .base import TrainableModel, check_images

MAX_LOGIT_SCALE = math.log(100.0)  # section 2.5 of the CLIP paper: clipped, or training becomes unstable


class QuickGELU(nn.Module):
    """The approximation of GELU that CLIP uses."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm attention and MLP on [B, N, D]."""

    def __init__(self, width: int, n_layer: int, n_head: int) -> None:
        super().__init__()
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.attn = nn.MultiheadAttention(width, n_head, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=up, gelu=QuickGELU(), c_proj=down))
        self.ln_2 = nn.LayerNorm(width)
        nn.init.normal_(self.attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(self.attn.out_proj.weight, std=width**-0.5 * (2 * n_layer) ** -0.5)
        nn.init.normal_(up.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(down.weight, std=width**-0.5 * (2 * n_layer) ** -0.5)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, n_layer: int, n_head: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, n_layer, n_head) for _ in range(n_layer))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:  # [B, N, D] -> [B, N, D]
        for block in self.resblocks:
            x = block(x, mask)
        return x


class VisionTransformer(nn.Module):
    """Images [B, 3, S, S] to features [B, embed_dim], read at the class token."""

    def __init__(self, cfg: CLIPConfig) -> None:
        super().__init__()
        width, patch = cfg.vision_width, cfg.patch_size
        n_patch = (cfg.image_size // patch) ** 2
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = _normal(width, std=width**-0.5)
        self.positional_embedding = _normal(n_patch + 1, width, std=width**-0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, cfg.vision_layers, width // cfg.head_dim)
        self.ln_post = nn.LayerNorm(width)
        self.proj = _normal(width, cfg.embed_dim, std=width**-0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.conv1(2 * images - 1).flatten(2).transpose(1, 2)  # [B, patches, width]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


def _normal(*shape: int, std: float) -> nn.Parameter:
    """A parameter with normally distributed values."""
    parameter = nn.Parameter(torch.empty(shape))
    nn.init.normal_(parameter, std=std)
    return parameter


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


class CLIP(TrainableModel):
    """Features of images [B, 3, S, S] in [0, 1] and of encoded captions [B, T] in one space."""

    entry_points = ("loss",)

    def __init__(self, cfg: CLIPConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.visual = VisionTransformer(cfg)
        self.token_embedding = nn.Embedding(cfg.text_vocab + cfg.text_len, cfg.text_width)
        self.positional_embedding = _normal(cfg.text_len, cfg.text_width, std=0.01)
        self.transformer = Transformer(cfg.text_width, cfg.text_layers, cfg.text_width // cfg.head_dim)
        self.ln_final = nn.LayerNorm(cfg.text_width)
        self.text_projection = _normal(cfg.text_width, cfg.embed_dim, std=cfg.text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.empty(()))
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    @property
    def scale(self) -> torch.Tensor:
        """Factor on cosines, a scalar: the inverse of the temperature, limited."""
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()

    def resblocks(self) -> list[tuple[str, nn.Module]]:
        """The layers of the image tower, then those of the text tower."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, ResidualAttentionBlock)]

    def embeddings(self) -> set[nn.Parameter]:
        positions = self.positional_embedding, self.visual.positional_embedding
        return super().embeddings() | {*positions, self.visual.class_embedding}

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors, [B, embed_dim]."""
        s = self.cfg.image_size
        if images.ndim != 4 or images.shape[1:] != (3, s, s):
            raise ValueError(f"images: expected [B, 3, {s}, {s}], got {list(images.shape)}")
        return F.normalize(self.visual(images), dim=-1)

    def encode_text(self, text_tokens: torch.Tensor) -> torch.Tensor:
        """Unit vectors, [B, embed_dim]."""
        t = self.cfg.text_len
        if text_tokens.ndim != 2 or text_tokens.shape[1] != t:
            raise ValueError(f"text_tokens: expected [B, {t}], got {list(text_tokens.shape)}")
        x = self.token_embedding(text_tokens) + self.positional_embedding
        causal = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)  # True: masked
        x = self.ln_final(self.transformer(x, causal))
        length = (text_tokens < self.cfg.text_vocab).sum(1)  # padding ids come after the vocabulary
        end = length.clamp(max=t - 1)  # the first padding token, or the last token of a full caption
        return F.normalize(x[torch.arange(len(x), device=x.device), end] @ self.text_projection, dim=-1)

    def logits(self, images: torch.Tensor, text_tokens: torch.Tensor) -> torch.Tensor:
        """Scaled cosine of every image with every caption, [images, captions]."""
        return self.scale * self.encode_image(images) @ self.encode_text(text_tokens).T

    def loss(
        self,
        images: torch.Tensor,
        text_tokens: torch.Tensor,
        gather: Callable[[torch.Tensor], torch.Tensor] = _identity,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Symmetric contrastive cross-entropy in nats; pair i of the batch belongs together. Also ``accuracy``.

        Equal captions within a batch all count as right, in equal shares.

        Args:
            images, text_tokens: the pairs, [B, 3, S, S] and [B, T].
            gather: from tensors of this process, [B, ...], to those of all processes, [W * B, ...]. The loss is the
                mean over the pairs of this process, each compared with those of all.
        """
        scale = self.scale
        of_images, of_texts = self.encode_image(images), self.encode_text(text_tokens)
        all_images, all_texts, all_tokens = gather(of_images), gather(of_texts), gather(text_tokens)
        logits = scale * of_images @ all_texts.T
        logits_of_texts = logits.T if all_images is of_images else scale * of_texts @ all_images.T
        same = (text_tokens[:, None] == all_tokens[None, :]).all(-1).to(logits.dtype)
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits_of_texts, target)) / 2
        best = logits.argmax(1)
        return loss, {"accuracy": same[torch.arange(len(best), device=best.device), best].mean()}

    @torch.no_grad()
    def score(self, images: torch.Tensor, text_tokens: torch.Tensor) -> torch.Tensor:
        """Scaled cosine of image i with caption i, or with the one caption given: [B].

        Raises:
            ValueError: shapes that do not fit, or images that are not finite or outside of [0, 1].
        """
        check_images(images)
        if len(text_tokens) not in (1, len(images)):
            raise ValueError(f"text_tokens: expected 1 or {len(images)} captions, got {len(text_tokens)}")
        return self.scale * (self.encode_image(images) * self.encode_text(text_tokens)).sum(-1)
