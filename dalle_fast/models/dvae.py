"""Discrete VAE: images to a grid of codes, and back (section 2.1, appendix A).

Architecture and parameter names are those of the release, so that its weights fit: ``encoder.blocks.input.w``,
``decoder.blocks.group_1.block_1.res_path.conv_1.w``, ...
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from ..config import DVAEConfig
from ..ops import gumbel_quantize
from .base import TrainableModel, check_images
from .precision import rounded_conv2d

PIXEL_MARGIN = 0.1  # e of appendix A.3: distance of pixels to 0 and 1, where the logit is infinite


def map_pixels(images: torch.Tensor) -> torch.Tensor:
    """phi of appendix A.3: [0, 1] to [e, 1 - e]."""
    return (1 - 2 * PIXEL_MARGIN) * images + PIXEL_MARGIN


def unmap_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """The inverse of ``map_pixels``, clamped to [0, 1]."""
    return ((pixels - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)).clamp(0, 1)


def logit_laplace_nll(pixels: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """-ln f(x | mu, b) of the logit-Laplace distribution (appendix A.3), nats per value.

    pixels in (0, 1), mu and log_b have one shape, and so has the result.
    """
    log_jacobian = torch.log(pixels) + torch.log1p(-pixels)
    return (torch.logit(pixels) - mu).abs() * torch.exp(-log_b) + log_b + math.log(2.0) + log_jacobian


class Conv2d(nn.Module):
    """Convolution that keeps the size, in the dtype of its input; the release calls its parameters ``w`` and ``b``."""

    def __init__(self, n_in: int, n_out: int, kw: int) -> None:
        super().__init__()
        self.kw = kw
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / math.sqrt(n_in * kw**2))
        self.b = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, n_in, h, w] -> [B, n_out, h, w]
        padding = (self.kw - 1) // 2
        if x.dtype != self.w.dtype:
            return rounded_conv2d(x, self.w, self.b, padding)
        return F.conv2d(x, self.w, self.b, padding=padding)


class ResBlock(nn.Module):
    """Bottleneck resblock: four convolutions at a quarter of the width, the branch scaled by ``gain``."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        n_hid = n_out // 4
        widths = (n_in, n_hid, n_hid, n_hid, n_out)
        path: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kw in enumerate(kernels):
            path[f"relu_{i + 1}"] = nn.ReLU()
            path[f"conv_{i + 1}"] = Conv2d(widths[i], widths[i + 1], kw)
        self.gain = gain
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res_path = nn.Sequential(path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, n_in, h, w] -> [B, n_out, h, w]
        return self.id_path(x) + self.gain * self.res_path(x)


def _groups(
    cfg: DVAEConfig, widths: list[int], kernels: tuple[int, int, int, int], resample: tuple[str, nn.Module]
) -> OrderedDict[str, nn.Module]:
    """Groups of resblocks of widths[1:] on an input of widths[0]; the resolution changes between two groups."""
    n_blk = cfg.n_blk_per_group
    groups: OrderedDict[str, nn.Module] = OrderedDict()
    for g in range(1, len(widths)):
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(n_blk):
            blocks[f"block_{i + 1}"] = ResBlock(
                widths[g - 1] if i == 0 else widths[g], widths[g], kernels, cfg.branch_gain
            )
        if g < len(widths) - 1:
            blocks[resample[0]] = resample[1]
        groups[f"group_{g}"] = nn.Sequential(blocks)
    return groups


def count_codes(codes: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """How often each code occurs: int64 [vocab_size]. Unlike ``torch.bincount``, it never waits for a GPU."""
    flat = codes.flatten()
    return flat.new_zeros(vocab_size).index_add_(0, flat, torch.ones_like(flat))


class Encoder(nn.Module):
    """Images [B, 3, S, S] (pixels mapped by phi) to logits over the codes [B, K, h, w]."""

    def __init__(self, cfg: DVAEConfig) -> None:
        super().__init__()
        widths = [cfg.n_hid] + [cfg.n_hid * multiple for multiple in cfg.groups]
        blocks: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(3, cfg.n_hid, 7))
        blocks.update(_groups(cfg, widths, (3, 3, 3, 1), ("pool", nn.MaxPool2d(2))))
        blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(widths[-1], cfg.vocab_size, 1)))
        self.blocks = nn.Sequential(blocks)

    def forward(self, pixels: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        features = self.blocks[:-1](pixels.to(dtype))
        return self.blocks.output(features.to(pixels.dtype))


class Decoder(nn.Module):
    """Codes to the parameters of the likelihood, [B, 6, S, S]: mu in channels 0-2, ln b in channels 3-5.

    The first convolution is 1x1 on one-hot codes, that is, a codebook: ``forward`` starts after it.
    """

    def __init__(self, cfg: DVAEConfig) -> None:
        super().__init__()
        widths = [cfg.n_init] + [cfg.n_hid * multiple for multiple in reversed(cfg.groups)]
        blocks: OrderedDict[str, nn.Module] = OrderedDict(input=Conv2d(cfg.vocab_size, cfg.n_init, 1))
        blocks.update(_groups(cfg, widths, (1, 3, 3, 3), ("upsample", nn.Upsample(scale_factor=2))))
        blocks["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(widths[-1], 6, 1)))
        self.blocks = nn.Sequential(blocks)

    @property
    def codebook(self) -> torch.Tensor:
        """One row per code, [K, n_init]."""
        return self.blocks.input.w[:, :, 0, 0].T

    def forward(self, z: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """z [B, n_init, h, w]: the codebook rows of the codes."""
        z = z + self.blocks.input.b[:, None, None]
        return self.blocks[1:](z.to(dtype)).to(z.dtype)


class DiscreteVAE(TrainableModel):
    """Stage 1: images [B, 3, S, S] in [0, 1] to codes [B, h, w] in [0, vocab_size), and back."""

    entry_points = ("loss", "encode", "decode")

    def __init__(self, cfg: DVAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)

    def resblocks(self) -> list[tuple[str, nn.Module]]:
        """Those of the encoder, then those of the decoder."""
        return [(name, module) for name, module in self.named_modules() if isinstance(module, ResBlock)]

    def _check(self, images: torch.Tensor) -> None:
        s = self.cfg.image_size
        if images.ndim != 4 or images.shape[1:] != (3, s, s) or not images.is_floating_point():
            raise ValueError(f"images: expected float [B, 3, {s}, {s}], got {images.dtype} {list(images.shape)}")

    def logits(self, images: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Unnormalised log-probabilities of the codes, [B, K, h, w]; ``dtype`` as in ``loss``."""
        self._check(images)
        return self.encoder(map_pixels(images), dtype)

    @torch.no_grad()
    def encode(self, images: torch.Tensor, check_range: bool = True) -> torch.Tensor:
        """The likeliest code at each position, without noise (section 2.2): int64 [B, h, w].

        Args:
            images: [B, 3, S, S] in [0, 1].
            check_range: whether the values are checked, which waits for a GPU.

        Raises:
            ValueError: images of another shape, or values that are not finite or outside of [0, 1].
        """
        self._check(images)
        if check_range:
            check_images(images)
        return self.logits(images).argmax(1)

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [B, h, w] to images [B, 3, S, S] in [0, 1]: the median of the likelihood."""
        k = self.cfg.vocab_size
        if codes.ndim != 3 or codes.numel() == 0 or not 0 <= int(codes.min()) <= int(codes.max()) < k:
            raise ValueError(f"codes: expected [B, h, w] in [0, {k}), got {list(codes.shape)}")
        mu = self.decoder(F.embedding(codes, self.decoder.codebook).permute(0, 3, 1, 2))[:, :3]
        return unmap_pixels(torch.sigmoid(mu))

    def loss(
        self, images: torch.Tensor, tau: float, beta: float, seed: int | torch.Tensor, dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The negative evidence lower bound in nats per pixel value (section 2.1, appendix A.2).

        Args:
            images: [B, 3, S, S] in [0, 1].
            tau: temperature of the relaxation.
            beta: weight of the KL to the uniform prior, which is summed over an image and averaged over the batch.
            seed: seed of the Gumbel noise.
            dtype: dtype of the convolutions, see ``precision.py``; None is that of the images.

        Returns:
            The loss, and its parts: ``nll`` (nats per value), ``kl`` (nats per image), ``mse`` of the
            reconstruction, and ``code_counts`` [K], the number of times each code was sampled.
        """
        logits = self.logits(images, dtype)
        z, kl, codes = gumbel_quantize(logits, self.decoder.codebook, tau, seed)
        mu, log_b = self.decoder(z, dtype).chunk(2, dim=1)
        nll = logit_laplace_nll(map_pixels(images), mu, log_b).mean()
        loss = nll + beta * kl.mean() / images[0].numel()
        with torch.no_grad():
            metrics = {
                "nll": nll.detach(),
                "kl": kl.mean(),
                "mse": F.mse_loss(unmap_pixels(torch.sigmoid(mu)), images),
                "code_counts": count_codes(codes, self.cfg.vocab_size),
            }
        return loss, metrics
