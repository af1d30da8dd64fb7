"""The prior: a sparse transformer over one stream of text and image tokens (section 2.2, appendix B).

Text tokens get a position embedding, image tokens a row and a column embedding. Every token predicts the next one; the
first text token is predicted from a learned ``start`` vector. Names in shapes: B batch, T text_len, h x w image grid,
N = T + h * w stream, D d_model, H heads, E head_dim; in sampling, P prompts with n candidates each, C = P * n.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..config import DALLEConfig, Sampling
from ..mask import AttentionMask, layer_masks
from ..ops import (
    PackedWeight,
    decode_attention,
    pack_linear,
    packed_linear,
    residual_layer_norm,
    sparse_attention,
)
from ..ops.packed_linear import FORMATS
from ..sampling import ImagePrompt, check_image_prompt, draw_codes
from .base import TrainableModel
from .precision import Precision, rounded_linear

TEXT_WEIGHT = 1 / 8  # of the loss; the image has the rest
MOST_PACKED_ROWS = 128  # beyond, an ordinary matrix product is as fast
PLAIN = Precision()  # everything in the dtype of the parameters


class Caches(NamedTuple):
    """Keys and values of one layer during sampling, in the order of ``decode_attention``."""

    text_k: torch.Tensor  # [P, H, T, E], shared by the candidates of a prompt
    text_v: torch.Tensor
    image_k: torch.Tensor  # [C, H, cache_len, E], room for what the layer's mask can still see
    image_v: torch.Tensor


def _check_range(name: str, values: torch.Tensor, limit: int, wait: bool = False) -> None:
    """Raise ValueError unless all values are in [0, limit). On a GPU they are read only if the host may ``wait``."""
    if (wait or values.device.type == "cpu") and not 0 <= int(values.min()) <= int(values.max()) < limit:
        raise ValueError(f"{name}: expected values in [0, {limit}), got {int(values.min())} to {int(values.max())}")


class Linear(nn.Linear):
    """A linear layer that can keep a second copy of its weight, in a layout that multiplies few rows fast.

    For inputs in 16 bits the weight is rounded to their dtype.
    """

    packed: PackedWeight | None = None  # made by ``DALLE.prefill``, and read by sampling alone

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.weight.dtype:
            return rounded_linear(x, self.weight, self.bias)
        return super().forward(x)

    def sampling(self, x: torch.Tensor) -> torch.Tensor:
        """``forward`` for sampling: on the packed copy, if there is one, for few rows and without gradients."""
        few = x.numel() <= MOST_PACKED_ROWS * self.in_features
        if few and self.packed is not None and not torch.is_grad_enabled():
            return packed_linear(x, self.packed, self.bias)
        return self(x)


class Attention(nn.Module):
    """Multi-head self-attention under one mask, for a whole stream or for one new token on caches."""

    def __init__(self, d_model: int, head_dim: int, mask: AttentionMask) -> None:
        super().__init__()
        self.head_dim, self.mask = head_dim, mask
        self.qkv = Linear(d_model, 3 * d_model)
        self.out = Linear(d_model, d_model)

    def heads(self, x: torch.Tensor, sampling: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, N, D] -> q, k, v, each [B, H, N, E]; ``sampling`` as in ``Linear``."""
        b, n, _ = x.shape
        qkv = self.qkv.sampling(x) if sampling else self.qkv(x)
        q, k, v = qkv.view(b, n, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        return q, k, v

    def merge(self, y: torch.Tensor, sampling: bool = False) -> torch.Tensor:
        """[B, H, N, E] -> [B, N, D]."""
        y = y.transpose(1, 2).flatten(2)
        return self.out.sampling(y) if sampling else self.out(y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.merge(sparse_attention(*self.heads(x), self.mask))

    def prefill(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attend within the text alone, [P, T, D], where every mask is causal; also return its keys and values."""
        q, k, v = self.heads(x, sampling=True)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True), sampling=True), k, v

    def decode(self, x: torch.Tensor, caches: Caches, position: torch.Tensor) -> torch.Tensor:
        """Attend from one new image token of each candidate, [C, 1, D], at raster index ``position``."""
        q, k, v = (t[:, :, 0] for t in self.heads(x, sampling=True))  # [C, H, E]
        return self.merge(decode_attention(q, k, v, *caches, position, self.mask)[:, :, None], sampling=True)


class Layer(nn.Module):
    """Two pre-norm resblocks on the residual stream: attention, then an MLP four times as wide.

    A whole stream runs through the resblocks of all layers in :meth:`DALLE.forward`.
    """

    def __init__(self, d_model: int, head_dim: int, mask: AttentionMask) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(d_model)
        self.attn = Attention(d_model, head_dim, mask)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(Linear(d_model, 4 * d_model), nn.GELU(), Linear(4 * d_model, d_model))

    def resblocks(self) -> list[tuple[str, nn.LayerNorm, nn.Module]]:
        """Name in the layer, norm in front, and module of each."""
        return [("attn", self.attn_norm, self.attn), ("mlp", self.mlp_norm, self.mlp)]

    def prefill(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attended, k, v = self.attn.prefill(self.attn_norm(x))
        x = x + attended
        return x + self.sampling_mlp(self.mlp_norm(x)), k, v

    def decode(self, x: torch.Tensor, caches: Caches, position: torch.Tensor) -> torch.Tensor:
        x = x + self.attn.decode(self.attn_norm(x), caches, position)
        return x + self.sampling_mlp(self.mlp_norm(x))

    def sampling_mlp(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP as in sampling, see ``Linear``."""
        up, gelu, down = self.mlp
        return down.sampling(gelu(up.sampling(x)))


class DALLE(TrainableModel):
    """p(text, image): text tokens [B, T] in [0, text_vocab + T), codes [B, h, w] in [0, image_vocab).

    Text position i pads with its own token, text_vocab + i; padding is attended to like any token.
    """

    packed_format: str | None = None  # of the weights that sampling reads on a CPU; None: as they are

    def __init__(self, cfg: DALLEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        d = cfg.d_model
        self.text_embedding = nn.Embedding(cfg.text_vocab + cfg.text_len, d)
        self.text_position = nn.Embedding(cfg.text_len, d)
        self.image_embedding = nn.Embedding(cfg.image_vocab, d)
        self.row_embedding = nn.Embedding(cfg.height, d)
        self.column_embedding = nn.Embedding(cfg.width, d)
        self.start = nn.Parameter(torch.empty(d))
        masks = layer_masks(cfg.n_layer, cfg.text_len, cfg.height, cfg.width, cfg.kernel)
        self.layers = nn.ModuleList(Layer(d, cfg.head_dim, mask) for mask in masks)
        self.norm = nn.LayerNorm(d)
        self.to_text = nn.Linear(d, cfg.text_vocab + cfg.text_len)
        self.to_image = Linear(d, cfg.image_vocab)
        self._init_weights()

    def _init_weights(self) -> None:
        nn.init.normal_(self.start, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=self.init_std(name))
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def init_std(self, name: str) -> float:
        """Standard deviation of the random weight of a linear layer, by its name.

        Every layer adds two branches to the stream: their last matrices are damped, so that its variance does not grow
        with depth.
        """
        return 0.02 / math.sqrt(2 * self.cfg.n_layer) if name.endswith(("attn.out", "mlp.2")) else 0.02

    @property
    def device(self) -> torch.device:
        return self.start.device

    # ------------------------------------------------------------------------------------------ parts, by name

    def resblocks(self) -> list[tuple[str, nn.Module]]:
        """The attention and the MLP of every layer in turn."""
        layers = enumerate(self.layers)
        return [(f"layers.{i}.{name}", resblock) for i, layer in layers for name, _, resblock in layer.resblocks()]

    def stacked_matrices(self) -> dict[str, int]:
        return {f"{name}.qkv.weight": 3 for name, part in self.resblocks() if isinstance(part, Attention)}

    # ------------------------------------------------------------------------------------------ checks

    def check_text(self, text_tokens: torch.Tensor, wait: bool = False) -> None:
        """Raise ValueError or TypeError unless text_tokens is a batch of encoded captions; ``wait``: _check_range."""
        t, limit = self.cfg.text_len, self.cfg.text_vocab + self.cfg.text_len
        if text_tokens.ndim != 2 or text_tokens.shape[1] != t or text_tokens.shape[0] == 0:
            raise ValueError(f"text_tokens: expected [B, {t}] with B >= 1, got {list(text_tokens.shape)}")
        if text_tokens.dtype != torch.int64:
            raise TypeError(f"text_tokens: expected int64, got {text_tokens.dtype}")
        _check_range("text_tokens", text_tokens, limit, wait)

    def check_codes(self, codes: torch.Tensor) -> None:
        """Raise ValueError or TypeError unless codes is a batch of image grids; on a GPU, values are not read."""
        h, w, limit = self.cfg.height, self.cfg.width, self.cfg.image_vocab
        if codes.ndim != 3 or tuple(codes.shape[1:]) != (h, w) or codes.shape[0] == 0:
            raise ValueError(f"codes: expected [B, {h}, {w}] with B >= 1, got {list(codes.shape)}")
        if codes.dtype != torch.int64:
            raise TypeError(f"codes: expected int64, got {codes.dtype}")
        _check_range("codes", codes, limit)

    # ------------------------------------------------------------------------------------------ whole streams

    def embed_text(self, text_tokens: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, D]."""
        return self.text_embedding(text_tokens) + self.text_position.weight

    def embed_image(self, codes: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Codes [B, n] at raster indices ``position`` [n] -> [B, n, D]."""
        rows = self.row_embedding(position // self.cfg.width)
        return self.image_embedding(codes) + rows + self.column_embedding(position % self.cfg.width)

    def forward(
        self, text_tokens: torch.Tensor, codes: torch.Tensor, precision: Precision = PLAIN
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of every token given those before it: [B, T, text_vocab + T] and [B, h * w, image_vocab]."""
        self.check_text(text_tokens)
        self.check_codes(codes)
        b, t = text_tokens.shape
        raster = torch.arange(self.cfg.image_len, device=codes.device)
        x = torch.cat([self.embed_text(text_tokens), self.embed_image(codes.flatten(1), raster)], dim=1)
        branch, resblocks = None, [resblock for layer in self.layers for resblock in layer.resblocks()]
        for i, (_, norm, resblock) in enumerate(resblocks):
            between = precision.between(i, len(resblocks))
            x, normed = residual_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, *between)
            branch = precision.run(resblock, norm, x, normed)
        between, norm = precision.between(len(resblocks), len(resblocks)), self.norm
        _, x = residual_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, *between)
        x = torch.cat([norm(self.start).expand(b, 1, -1), x[:, :-1]], dim=1)  # to predict each token from
        return self.to_text(x[:, :t]), self.to_image(x[:, t:])

    def loss(
        self, text_tokens: torch.Tensor, codes: torch.Tensor, precision: Precision = PLAIN
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Cross-entropy in nats, weighted 1/8 text and 7/8 image (section 2.2).

        Returns:
            The loss, and its parts ``text_loss`` and ``image_loss``, each averaged over its own tokens.
        """
        logits_text, logits_image = self(text_tokens, codes, precision)
        text = F.cross_entropy(logits_text.flatten(0, 1), text_tokens.flatten())
        image = F.cross_entropy(logits_image.flatten(0, 1), codes.flatten())
        parts = {"text_loss": text.detach(), "image_loss": image.detach()}
        return TEXT_WEIGHT * text + (1 - TEXT_WEIGHT) * image, parts

    # ------------------------------------------------------------------------------------------ sampling

    def pack(self, format: str = "float32") -> DALLE:
        """Have sampling on a CPU read copies of the weights in the layout of its kernels; returns self.

        ``prefill``, and so each ``generate``, makes the copies anew: there is no change of a weight that they outlive.
        Training and whole streams use the weights as they are. Only models in float32 have copies.

        Args:
            format: ``float32``, ``bfloat16`` or ``int8`` (one scale per output channel).

        Raises:
            ValueError: another format.
        """
        if format not in FORMATS:
            raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
        self.packed_format = format
        return self

    def renew_packed_weights(self) -> None:
        """Copy the weights as they are now, if ``pack`` has asked for that."""
        format = self.packed_format
        packs = self.device.type == "cpu" and self.start.dtype == torch.float32
        for module in self.modules():
            if isinstance(module, Linear):
                module.packed = pack_linear(module.weight, format) if packs and format else None

    def prefill(self, text_tokens: torch.Tensor, candidates: int) -> tuple[torch.Tensor, list[Caches]]:
        """Read each prompt once: [P, T] -> logits of the first code [P, image_vocab], and the caches of every layer.

        Copies the weights first, if ``pack`` has asked for that.
        """
        self.check_text(text_tokens)
        self.renew_packed_weights()
        x = self.embed_text(text_tokens)
        caches = []
        for layer in self.layers:
            x, k, v = layer.prefill(x)
            k, v = k.contiguous(), v.contiguous()  # once here, or in every step
            room = (len(x) * candidates, k.shape[1], layer.attn.mask.cache_len, k.shape[3])
            caches.append(Caches(k, v, k.new_zeros(room), v.new_zeros(room)))
        return self.to_image.sampling(self.norm(x[:, -1])), caches

    def decode(self, codes: torch.Tensor, position: torch.Tensor, caches: list[Caches]) -> torch.Tensor:
        """Feed the codes [C] of all candidates at raster index ``position``; logits of the next, [C, image_vocab]."""
        x = self.embed_image(codes[:, None], position[None])
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.decode(x, cache, position)
        return self.to_image.sampling(self.norm(x[:, 0]))

    @torch.no_grad()
    def generate(
        self,
        text_tokens: torch.Tensor,
        n: int,
        sampling: Sampling = Sampling(),
        image_prompt: ImagePrompt | None = None,
    ) -> torch.Tensor:
        """Sample n images for each caption (section 2.6): [P, T] -> codes [P * n, h, w], a caption's n together.

        On a CPU, a float32 model packs its weights first, in float32 unless ``pack`` has named another format.

        Args:
            text_tokens: encoded captions, int64 [P, T].
            n: candidates for each caption.
            sampling: temperature, top_k, top_p, guidance and seed. A caption's codes do not depend on the others.
            image_prompt: codes [h, w] and a bool map [h, w] of those to keep. The others must be a rectangle that
                reaches the bottom-right corner; they are sampled. Leading rows are the paper's image prompts.

        Raises:
            ValueError: text_tokens, n or image_prompt are not as above.
            RuntimeError: the logits of a code have NaN or no finite largest value.
        """
        self.check_text(text_tokens, wait=True)
        if n < 1:
            raise ValueError(f"n: expected 1 or more, got {n}")
        h, w, image_len = self.cfg.height, self.cfg.width, self.cfg.image_len
        if image_prompt is not None:
            check_image_prompt(image_prompt, h, w, self.cfg.image_vocab)
        prompts = len(text_tokens)
        guidance = self.cfg.guidance if sampling.guidance is None else sampling.guidance
        if guidance != 1.0:
            empty = torch.arange(self.cfg.text_len, device=self.device) + self.cfg.text_vocab
            text_tokens = torch.cat([text_tokens, empty.expand_as(text_tokens)])
        self.pack(self.packed_format or "float32")
        logits, caches = self.prefill(text_tokens, n)
        decode = partial(self.decode, caches=caches)
        first = logits.repeat_interleave(n, 0)
        *_, codes = draw_codes(decode, first, image_len, sampling, guidance, image_prompt, image_len, prompts)
        return codes.view(-1, h, w)
