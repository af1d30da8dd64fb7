"""The definition of every op in plain PyTorch: same names, same arguments, any device, differentiable.

Written from the paper and independent of the kernels. Nothing here is meant to be fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from . import minifloat
from .mask import AttentionMask

# ---------------------------------------------------------------------------------------------- attention


def sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask, scale: float | None = None
) -> torch.Tensor:
    """Softmax attention over the keys that the mask keeps. q, k, v, result: [B, H, N, D]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.transpose(-2, -1) * scale  # [B, H, N, N]
    scores = scores.masked_fill(~mask.dense(q.device), float("-inf"))
    return scores.softmax(-1) @ v


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    text_k: torch.Tensor,
    text_v: torch.Tensor,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    position: torch.Tensor,
    mask: AttentionMask,
    scale: float | None = None,
) -> torch.Tensor:
    """One step of sampling: store the new image token's key and value, then attend from it.

    q, k, v, result: [C, H, D], the new token of each candidate. text_k, text_v: [P, H, text_len, D], shared by the
    C / P consecutive candidates of a prompt. cache_k, cache_v: [C, H, cache_len, D], written in place. position:
    int64 scalar, the raster index of the new token; the tokens before it must already be in the cache.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    repeat = q.shape[0] // text_k.shape[0]
    cache_k[:, :, mask.cache_slot(position)] = k
    cache_v[:, :, mask.cache_slot(position)] = v
    past = torch.arange(mask.image_len, device=q.device)
    seen = past[mask.keep(mask.text_len + position, mask.text_len + past)]
    slots = mask.cache_slot(seen)
    keys = torch.cat([text_k.repeat_interleave(repeat, 0), cache_k[:, :, slots]], dim=2)  # [C, H, T + seen, D]
    values = torch.cat([text_v.repeat_interleave(repeat, 0), cache_v[:, :, slots]], dim=2)
    weights = (torch.einsum("chd,chnd->chn", q, keys) * scale).softmax(-1)
    return torch.einsum("chn,chnd->chd", weights, values)


# ---------------------------------------------------------------------------------------------- random numbers


def philox(seed: int | torch.Tensor, index: torch.Tensor, stream: int = 0) -> torch.Tensor:
    """Philox4x32-10 (Salmon et al., 2011): one 32-bit word per logical element, as int64 in [0, 2^32).

    The counter is (index // 4 low, index // 4 high, stream, 0), the key the two halves of the seed; lane index % 4 is
    the element's. A pure function of seed and index, so every kernel and every tiling draws the same numbers.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=index.device)
    word = 0xFFFFFFFF
    key = [seed & word, (seed >> 32) & word]
    block = index // 4
    counter = [block & word, block >> 32, torch.full_like(block, stream), torch.zeros_like(block)]
    for _ in range(10):
        # An int64 product wraps modulo 2^64, and its bits are those of the unsigned product.
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            ((b >> 32) & word) ^ counter[1] ^ key[0],
            b & word,
            ((a >> 32) & word) ^ counter[3] ^ key[1],
            a & word,
        ]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return torch.stack(counter, -1).gather(-1, (index % 4)[..., None])[..., 0]


def uniform(seed: int | torch.Tensor, index: torch.Tensor, stream: int = 0) -> torch.Tensor:
    """Float32 uniforms strictly inside (0, 1): 23 bits and a half, so that neither end is ever reached."""
    return ((philox(seed, index, stream) >> 9).float() + 0.5) * 2.0**-23


def gumbel_noise(seed: int | torch.Tensor, shape: torch.Size, device: torch.device | str | None = None) -> torch.Tensor:
    """Standard Gumbel noise, float32; element i (in contiguous order) is -log(-log(u_i))."""
    index = torch.arange(shape.numel(), device=device).view(shape)
    return -torch.log(-torch.log(uniform(seed, index)))


# ---------------------------------------------------------------------------------------------- sampling


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Minus infinity for all but the k largest of [C, K]; ties with the k-th stay."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Minus infinity for all but the smallest set of [C, K] whose probabilities reach p; never empty.

    Of equal logits the first ones are kept. Probabilities are counted in units of 2^-30 of the largest, so that their
    sums are exact and every implementation keeps the same set.
    """
    if p >= 1:
        return logits
    ordered, order = logits.sort(descending=True, dim=-1, stable=True)
    weights = ((ordered - ordered[..., :1]).exp() * 2.0**30).round().long()
    before = weights.cumsum(-1) - weights  # sum over the likelier codes
    enough = before.double() >= p * weights.sum(-1, keepdim=True).double()
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, enough)
    return logits.masked_fill(dropped, -torch.inf)


def sample(
    logits: torch.Tensor,
    seed: int | torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    first: int | torch.Tensor = 0,
    pitch: int | None = None,
) -> torch.Tensor:
    """One draw per row: the argmax of the kept logits, over the temperature, plus Gumbel noise. [C, K] -> int64 [C].

    The noise of row c, code i is element ``first + c * pitch + i`` of the seed's stream. float64 throughout, so that no
    two codes come close enough for rounding to decide.
    """
    rows, codes = logits.shape
    logits = logits.double()
    largest = logits.amax(-1, keepdim=True)
    if not largest.isfinite().all():
        row = int((~largest[:, 0].isfinite()).nonzero()[0])
        raise RuntimeError(f"logits: expected no NaN and a finite largest value in every row, not so in row {row}")
    scores = (keep_top_k(logits, top_k or codes) - largest) / temperature
    index = first + torch.arange(rows, device=logits.device)[:, None] * (codes if pitch is None else pitch)
    u = uniform(seed, index + torch.arange(codes, device=logits.device)).double()
    return (keep_top_p(scores, top_p or 1.0) - (-u.log()).log()).argmax(-1)


# ---------------------------------------------------------------------------------------------- quantization


def kl_to_uniform(logits: torch.Tensor) -> torch.Tensor:
    """KL(softmax(logits) || uniform over K), summed over the grid. logits [B, K, h, w] -> [B], nats."""
    log_q = logits.log_softmax(1)
    log_k = torch.log(torch.tensor(float(logits.shape[1]), dtype=logits.dtype, device=logits.device))
    return (log_q.exp() * (log_q + log_k)).sum(dim=(1, 2, 3))


def _widen(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of the arithmetic: float32 for 16 bits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def gumbel_softmax(
    logits: torch.Tensor, tau: float, seed: int | torch.Tensor, hard: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Relaxed one-hot sample over the codes (section 2.1). logits [B, K, h, w] -> y of that shape, kl [B] in nats.

    ``hard`` returns exact one-hots with the gradient of the soft sample. For 16 bits y is rounded at the end and kl
    is float32.
    """
    wide = _widen(logits)
    noise = gumbel_noise(seed, logits.shape, logits.device).to(wide.dtype)
    y = ((wide + noise) / tau).softmax(1)
    if hard:
        one_hot = torch.zeros_like(y).scatter_(1, y.argmax(1, keepdim=True), 1.0)
        y = one_hot - y.detach() + y
    return y.to(logits.dtype), kl_to_uniform(wide)


def gumbel_quantize(
    logits: torch.Tensor, codebook: torch.Tensor, tau: float, seed: int | torch.Tensor, hard: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``gumbel_softmax`` multiplied by the codebook: the decoder's first 1x1 convolution.

    logits [B, K, h, w], codebook [K, C] -> z [B, C, h, w], kl [B] in nats, codes [B, h, w], argmax of noisy logits.
    """
    y, kl = gumbel_softmax(_widen(logits), tau, seed, hard)
    return torch.einsum("bkhw,kc->bchw", y, _widen(codebook)).to(logits.dtype), kl, y.argmax(1)


# ---------------------------------------------------------------------------------------------- resblocks


class _EnterStream(torch.autograd.Function):
    """A resblock's output in the stream's dtype; its gradient enters the resblock scaled (figure 4)."""

    @staticmethod
    def forward(ctx: Any, branch: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
        ctx.dtype, ctx.scale = branch.dtype, scale
        return branch.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grad.to(ctx.dtype) if ctx.scale is None else scale_gradient(grad, ctx.scale, ctx.dtype), None, None


class _LeaveStream(torch.autograd.Function):
    """A resblock's input in its own dtype; its gradient leaves the resblock filtered and unscaled (figure 4)."""

    @staticmethod
    def forward(
        ctx: Any, normed: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None, nonfinite: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.dtype, ctx.scale, ctx.nonfinite = normed.dtype, scale, nonfinite
        return normed.to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        grad = grad.to(ctx.dtype)
        if ctx.scale is not None:
            ctx.nonfinite.masked_fill_(~grad.isfinite().all(), 1)
            grad = unscale_gradient(grad, ctx.scale)
        return grad, None, None, None


def residual_layer_norm(
    x: torch.Tensor,
    branch: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    scale_in: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    nonfinite: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a resblock's output to the residual stream and normalise the sum for the next one (section 2.4).

    x [..., D] fp32 stream, branch [..., D] any dtype -> (x + branch in x's dtype, its LayerNorm in ``dtype``).
    scale_in, scale_out: gradient scales of the resblocks behind and in front; nonfinite: int32, set to 1 on Inf or NaN.
    """
    total = x if branch is None else x + _EnterStream.apply(branch, x.dtype, scale_out)
    normed = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    return total, _LeaveStream.apply(normed, dtype or x.dtype, scale_in, nonfinite)


def scale_gradient(grad: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradient that enters a resblock on the way back: multiplied by the block's scale, cast (figure 4)."""
    return (grad * scale).to(dtype)


def unscale_gradient(grad: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The gradient that leaves a resblock: Inf and NaN become 0, then divided by the scale, in fp32 (figure 4)."""
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    return torch.where(grad.isfinite(), grad, torch.zeros_like(grad)) / scale


def update_scales(
    scale: torch.Tensor, since_division: torch.Tensor, nonfinite: torch.Tensor, replicas: int = 1
) -> None:
    """The gradient scales after a step, in place (appendix D); all [n]. Clears ``nonfinite``.

    since_division counts all steps, up to 125: without the skipped ones, a scale that is far too large would never be
    divided a second time.
    """
    since_division.add_(1).clamp_(max=125)
    finite = nonfinite == 0
    divide = ~finite & (since_division >= 125)
    divided = torch.where(divide, scale / torch.full_like(scale, 2.0).sqrt(), scale)
    scale.copy_(torch.where(finite, scale * 2 ** (1 / 1000), divided))
    scale.clamp_(replicas * 2.0**7, replicas * 2.0**24)
    since_division.masked_fill_(divide, 0)
    nonfinite.zero_()


# ---------------------------------------------------------------------------------------------- linear layers


def pack_linear(weight: torch.Tensor, format: str = "bfloat16") -> tuple[torch.Tensor, torch.Tensor, int, int, str]:
    """A weight [out, in] rounded to ``float32``, ``bfloat16`` or ``int8``: stored, scales, in, out, format.

    int8: weight = scale * stored with one scale per output, which takes its largest weight to 127.
    """
    scales = weight.new_empty(0)
    if format == "int8":
        scales = weight.abs().amax(1) / 127  # [out]
        steps = torch.where(scales[:, None] > 0, weight / scales[:, None], torch.zeros_like(weight))
        stored = steps.round().clamp(-127, 127).to(torch.int8)
    else:
        stored = weight.to(getattr(torch, format))
    return stored, scales, weight.shape[1], weight.shape[0], format


def packed_linear(
    x: torch.Tensor, packed: tuple[torch.Tensor, torch.Tensor, int, int, str], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``F.linear`` with the rounded weight, in the dtype of x. x [..., in] -> [..., out]."""
    stored, scales, _, _, format = packed
    weight = stored.to(x.dtype)
    if format == "int8":
        weight = weight * scales.to(x.dtype)[:, None]
    return F.linear(x, weight, bias)


# ---------------------------------------------------------------------------------------------- 16-bit moments


def adamw16(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    means: Sequence[torch.Tensor],
    variances: Sequence[torch.Tensor],
    step: int | torch.Tensor,
    lr: float | torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float | torch.Tensor,
    unscale: torch.Tensor | None = None,
    clip: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
) -> None:
    """One AdamW step of n parameters in place, moments kept in 16 bits (section 2.4, appendix D).

    params, grads float32; means (1-6-9) and variances (0-6-10, at most 5) as int16 bit patterns; step counts from 1;
    weight_decay one number or [n], unscale [n], clip one float32; skip [n] bool.
    """
    step = torch.as_tensor(step).double().reshape(())
    lr = torch.as_tensor(lr, dtype=torch.float32).reshape(())
    decays = torch.as_tensor(weight_decay, dtype=torch.float32).expand(len(params))
    for i, (param, grad, mean, variance) in enumerate(zip(params, grads, means, variances, strict=True)):
        factor = (1.0 if unscale is None else unscale[i]) * (1.0 if clip is None else clip.reshape(()))
        grad = grad * factor
        m = minifloat.decode(mean, "1-6-9")
        m = m + (grad - m) * (1 - beta1)
        s = minifloat.decode(variance, "0-6-10") * beta2 + grad.square() * (1 - beta2)
        s = torch.where(s < 5.0, s, torch.full_like(s, 5.0))  # NaN becomes 5, too
        update = (m / (1 - beta1**step)) / ((s / (1 - beta2**step)).sqrt() + eps)
        keep = torch.zeros((), dtype=torch.bool, device=param.device) if skip is None else skip[i]
        for old, new in (
            (param, param * (1 - lr * decays[i]) - lr * update),
            (mean, minifloat.encode(m, "1-6-9").view(torch.int16)),
            (variance, minifloat.encode(s, "0-6-10").view(torch.int16)),
        ):
            old.copy_(torch.where(keep, old, new))


def gradient_norm(
    grads: Sequence[torch.Tensor], unscale: torch.Tensor | None = None, skip: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm of all gradients, each multiplied by its unscale [n]: [] float32. And [n] bool: skip, or not finite."""
    squares = torch.stack([grad.double().square().sum() for grad in grads])
    if unscale is not None:
        squares = squares * unscale.double().square()
    skipped = ~squares.isfinite() if skip is None else ~squares.isfinite() | skip
    return torch.where(skipped, 0.0, squares).sum().sqrt().float(), skipped
