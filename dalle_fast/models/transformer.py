"""The prior: a sparse transformer over one stream of text and image tokens (section 2.2, appendix B).

Text tokens get a position embedding, image tokens a row and a column embedding. Every token predicts the next one; the
first text token is predicted from a learned ``start`` vector. Names in shapes: B batch, T text_len, h x w image grid,
N = T + h * w stream, D d_model, H heads, E head_dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..config import DALLEConfig
from ..mask import AttentionMask, layer_masks
from ..ops import (
    PackedWeight,
    decode_attention,
    pack_linear,
    packed_linear,
    residual_layer_norm,
    sample,
    sparse_attention,
)
from ..ops._library import reference_op
from ..ops.sample import check_options
from ..sampling import repeat
from .precision import Precision, rounded_linear

TEXT_WEIGHT = 1 / 8  # of the loss; the image has the rest
MOST_PACKED_ROWS = 128  # beyond, an ordinary matrix product is as fast
# Of one layer while sampling: keys and values of the prompts [P, H, T, E], and of the images [C, H, cache_len, E].
Caches = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Resblock = tuple[nn.LayerNorm, nn.Module]  # with the norm in front of it
PLAIN = Precision()  # everything in the dtype of the parameters


def guide(logits: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance: [2 C, K], with the caption and then without it -> [C, K]."""
    with_caption, without = logits.chunk(2)
    return without + guidance * (with_caption - without)


class Linear(nn.Linear):
    """A linear layer that can keep a second copy of its weight, in a layout that multiplies few rows fast.

    The copy serves steps of sampling: few rows and no gradients. It is ignored once the weight has changed. Rows in 16
    bits meet the weight rounded to them.
    """

    packed: tuple[tuple[int, int], PackedWeight] | None = None  # the weight's state, and its copy

    def _state(self) -> tuple[int, int]:
        return self.weight.data_ptr(), self.weight._version

    def pack(self, format: str) -> None:
        if self.packed is None or self.packed[0] != self._state() or self.packed[1].format != format:
            self.packed = self._state(), pack_linear(self.weight.detach(), format)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != self.weight.dtype:
            return rounded_linear(x, self.weight, self.bias)
        few = x.numel() <= MOST_PACKED_ROWS * self.in_features
        if few and self.packed is not None and not torch.is_grad_enabled() and self.packed[0] == self._state():
            return packed_linear(x, self.packed[1], self.bias)
        return super().forward(x)


class Attention(nn.Module):
    """Multi-head self-attention under one mask, for a whole stream or for one new token on caches."""

    def __init__(self, d_model: int, head_dim: int, mask: AttentionMask) -> None:
        super().__init__()
        self.head_dim, self.mask = head_dim, mask
        self.qkv = Linear(d_model, 3 * d_model)
        self.out = Linear(d_model, d_model)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, N, D] -> q, k, v, each [B, H, N, E]."""
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        return q, k, v

    def merge(self, y: torch.Tensor) -> torch.Tensor:
        """[B, H, N, E] -> [B, N, D]."""
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.merge(sparse_attention(*self.heads(x), self.mask))

    def prefill(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attend within the text alone, [P, T, D], where every mask is causal; also return its keys and values."""
        q, k, v = self.heads(x)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True)), k, v

    def decode(self, x: torch.Tensor, caches: Caches, position: torch.Tensor) -> torch.Tensor:
        """Attend from one new image token of each candidate, [C, 1, D], at raster index ``position``."""
        q, k, v = (t[:, :, 0] for t in self.heads(x))  # [C, H, E]
        return self.merge(decode_attention(q, k, v, *caches, position, self.mask)[:, :, None])


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

    def resblocks(self) -> list[Resblock]:
        return [(self.attn_norm, self.attn), (self.mlp_norm, self.mlp)]

    def prefill(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attended, k, v = self.attn.prefill(self.attn_norm(x))
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), k, v

    def decode(self, x: torch.Tensor, caches: Caches, position: torch.Tensor) -> torch.Tensor:
        x = x + self.attn.decode(self.attn_norm(x), caches, position)
        return x + self.mlp(self.mlp_norm(x))


class DALLE(nn.Module):
    """p(text, image): text tokens [B, T] in [0, text_vocab + T), codes [B, h, w] in [0, image_vocab).

    Text position i pads with its own token, text_vocab + i; padding is attended to like any token.
    """

    packed_format = "float32"  # of the weights that sampling reads

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
                # Every layer adds two branches to the stream: damp them so that its variance does not grow with depth.
                damp = math.sqrt(2 * self.cfg.n_layer) if name.endswith(("attn.out", "mlp.2")) else 1.0
                nn.init.normal_(module.weight, std=0.02 / damp)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    # ------------------------------------------------------------------------------------------ checks

    def check_text(self, text_tokens: torch.Tensor) -> None:
        """Raise ValueError unless text_tokens is a batch of encoded captions."""
        t, limit = self.cfg.text_len, self.cfg.text_vocab + self.cfg.text_len
        if text_tokens.ndim != 2 or text_tokens.shape[1] != t or text_tokens.shape[0] == 0:
            raise ValueError(f"text_tokens: expected [B, {t}] with B >= 1, got {list(text_tokens.shape)}")
        if text_tokens.dtype != torch.int64:
            raise TypeError(f"text_tokens: expected int64, got {text_tokens.dtype}")
        if not 0 <= int(text_tokens.min()) <= int(text_tokens.max()) < limit:
            raise ValueError(f"text_tokens: expected values in [0, {limit}), got up to {int(text_tokens.max())}")

    def check_codes(self, codes: torch.Tensor) -> None:
        """Raise ValueError unless codes is a batch of image grids."""
        h, w, limit = self.cfg.height, self.cfg.width, self.cfg.image_vocab
        if codes.ndim != 3 or tuple(codes.shape[1:]) != (h, w) or codes.shape[0] == 0:
            raise ValueError(f"codes: expected [B, {h}, {w}] with B >= 1, got {list(codes.shape)}")
        if codes.dtype != torch.int64:
            raise TypeError(f"codes: expected int64, got {codes.dtype}")
        if not 0 <= int(codes.min()) <= int(codes.max()) < limit:
            raise ValueError(f"codes: expected values in [0, {limit}), got up to {int(codes.max())}")

    # ------------------------------------------------------------------------------------------ whole streams

    def embed_text(self, text_tokens: torch.Tensor) -> torch.Tensor:
        """[B, T] -> [B, T, D]."""
        return self.text_embedding(text_tokens) + self.text_position.weight

    def embed_image(self, codes: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Codes [B, n] at raster indices ``position`` [n] -> [B, n, D]."""
        rows = self.row_embedding(position // self.cfg.width)
        return self.image_embedding(codes) + rows + self.column_embedding(position % self.cfg.width)

    def resblocks(self) -> list[Resblock]:
        """The attention and the MLP of every layer in turn."""
        return [resblock for layer in self.layers for resblock in layer.resblocks()]

    def forward(
        self, text_tokens: torch.Tensor, codes: torch.Tensor, precision: Precision = PLAIN
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of every token given those before it: [B, T, text_vocab + T] and [B, h * w, image_vocab]."""
        self.check_text(text_tokens)
        self.check_codes(codes)
        b, t = text_tokens.shape
        raster = torch.arange(self.cfg.image_len, device=codes.device)
        x = torch.cat([self.embed_text(text_tokens), self.embed_image(codes.flatten(1), raster)], dim=1)
        branch, resblocks = None, self.resblocks()
        for i, (norm, resblock) in enumerate(resblocks):
            between = precision.between(i, len(resblocks))
            x, normed = residual_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, *between)
            branch = precision.run(resblock, norm, x, normed)
        between, norm = precision.between(len(resblocks), len(resblocks)), self.norm
        _, x = residual_layer_norm(x, branch, norm.weight, norm.bias, norm.eps, *between)
        x = torch.cat([norm(self.start).expand(b, 1, -1), x[:, :-1]], dim=1)  # what each token is predicted from
        return self.to_text(x[:, :t]), self.to_image(x[:, t:])

    def losses(
        self, text_tokens: torch.Tensor, codes: torch.Tensor, precision: Precision = PLAIN
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the text and of the image, each averaged over its own tokens, in nats."""
        logits_text, logits_image = self(text_tokens, codes, precision)
        text = F.cross_entropy(logits_text.flatten(0, 1), text_tokens.flatten())
        return text, F.cross_entropy(logits_image.flatten(0, 1), codes.flatten())

    def loss(self, text_tokens: torch.Tensor, codes: torch.Tensor, precision: Precision = PLAIN) -> torch.Tensor:
        """The training loss: 1/8 text, 7/8 image (section 2.2)."""
        text, image = self.losses(text_tokens, codes, precision)
        return TEXT_WEIGHT * text + (1 - TEXT_WEIGHT) * image

    # ------------------------------------------------------------------------------------------ one token at a time

    def pack(self, format: str | None = None) -> DALLE:
        """Copy the weights that sampling reads into the layout of its kernels, unless that was done; returns self.

        Args:
            format: ``float32``, ``bfloat16`` or ``int8`` (one scale an output channel); None is that of the last call,
                float32 at first. Training and whole streams go on using the weights as they are.
        """
        self.packed_format = format or self.packed_format
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack(self.packed_format)
        return self

    def prefill(self, text_tokens: torch.Tensor, candidates: int) -> tuple[torch.Tensor, list[Caches]]:
        """Read P prompts once: [P, T] -> logits of the first code [P, image_vocab] and the caches of every layer.

        A layer's caches are the prompt's keys and values, [P, H, T, E], shared by its candidates, and room for
        what its mask can still see of each of the P * candidates images, [P * candidates, H, cache_len, E].
        """
        self.check_text(text_tokens)
        x = self.embed_text(text_tokens)
        caches = []
        for layer in self.layers:
            x, k, v = layer.prefill(x)
            k, v = k.contiguous(), v.contiguous()  # once here, or in every step
            room = (len(x) * candidates, k.shape[1], layer.attn.mask.cache_len, k.shape[3])
            caches.append((k, v, k.new_zeros(room), v.new_zeros(room)))
        return self.to_image(self.norm(x[:, -1])), caches

    def decode(self, codes: torch.Tensor, position: torch.Tensor, caches: list[Caches]) -> torch.Tensor:
        """Feed each candidate's code [C] at raster index ``position``; logits of the next one, [C, image_vocab]."""
        x = self.embed_image(codes[:, None], position[None])
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.decode(x, cache, position)
        return self.to_image(self.norm(x[:, 0]))

    @torch.no_grad()
    def generate(
        self,
        text_tokens: torch.Tensor,
        n: int,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        image_prompt: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Sample n images for each caption (section 2.6): [P, T] -> codes [P * n, h, w], a prompt's n together.

        Args:
            text_tokens: encoded captions, int64 [P, T].
            n: candidates for each caption.
            generator: source of randomness; the same state gives the same codes.
            temperature, top_k, top_p: shape the distribution of each code; 1 and None leave it as it is.
            guidance: weight of the caption against the empty caption; 1 is no guidance and costs nothing.
            image_prompt: codes [h, w] and a bool map [h, w] of those to keep. The others must be a rectangle that
                reaches the bottom-right corner; they are drawn anew. Leading rows are the paper's image prompts.
        """
        self.check_text(text_tokens)
        check_options(temperature, top_k, top_p)
        if not math.isfinite(guidance):
            raise ValueError(f"guidance: expected a finite number, got {guidance}")
        if n < 1:
            raise ValueError(f"n: expected 1 or more, got {n}")
        given, keep = self._check_prompt(image_prompt)

        guided = guidance != 1.0
        if guided:
            empty = torch.arange(self.cfg.text_len, device=text_tokens.device) + self.cfg.text_vocab
            text_tokens = torch.cat([text_tokens, empty.expand_as(text_tokens)])
        if text_tokens.device.type == "cpu" and self.start.dtype == torch.float32:
            self.pack()
        logits, caches = self.prefill(text_tokens, n)
        device, steps, vocab = logits.device, self.cfg.image_len, self.cfg.image_vocab
        seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device if generator else None)
        seed, given, keep = seed.to(device), given.to(device), keep.to(device)
        # What one step leaves to the next, besides the caches.
        codes = torch.zeros(len(logits) * n // (1 + guided), steps, dtype=torch.int64, device=device)
        position = torch.zeros(1, dtype=torch.int64, device=device)  # of the newest codes

        def choose(logits: torch.Tensor) -> None:
            """Write the codes at ``position``."""
            # A candidate's noise depends on its place and the step, not on how many candidates there are.
            shaped = guide(logits, guidance) if guided else logits
            drawn = sample(shaped, seed, temperature, top_k, top_p, first=position * vocab, pitch=steps * vocab)
            codes.index_copy_(1, position, torch.where(keep[position], given[position], drawn)[:, None])

        def step() -> None:
            """Feed the newest codes and choose the next ones; the host learns nothing of either."""
            newest = codes.index_select(1, position)[:, 0].clamp(min=0)  # -1 marks a row that nothing can be drawn from
            logits = self.decode(newest.repeat(2) if guided else newest, position[0], caches)
            position.add_(1)
            choose(logits)

        choose(logits.repeat_interleave(n, 0))
        waits = any(reference_op(op, device) for op in ("decode_attention", "sample"))  # references read on the host
        repeat(step, steps - 1, graph_on=device if device.type == "cuda" and not waits else None)
        if bool((codes < 0).any()):  # waits for the device, once
            raise RuntimeError("logits: expected no NaN and a finite largest value in every row of every step")
        return codes.view(-1, self.cfg.height, self.cfg.width)

    def _check_prompt(self, prompt: tuple[torch.Tensor, torch.Tensor] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes and a bool map of those that stay, both [h * w]."""
        h, w = self.cfg.height, self.cfg.width
        if prompt is None:
            return torch.zeros(h * w, dtype=torch.int64), torch.zeros(h * w, dtype=torch.bool)
        codes, keep = prompt
        self.check_codes(codes[None])
        if keep.shape != (h, w) or keep.dtype != torch.bool:
            raise ValueError(f"image_prompt: expected a bool map [{h}, {w}], got {keep.dtype} {list(keep.shape)}")
        fresh = (~keep).nonzero()
        if len(fresh) == 0 or not bool((~keep[fresh[:, 0].min() :, fresh[:, 1].min() :]).all()):
            raise ValueError("image_prompt: expected what is drawn anew to be a rectangle with the bottom-right corner")
        return codes.flatten(), keep.flatten()
