"""Whole models: seconds for the pictures of one prompt, and a training step.

On a CPU at 12 layers, d 512, 256 + 32 x 32 tokens; on a GPU the preset of 1.2 billion parameters.

Peers: the same weights on torch's own attention with a full cache, and on a CPU dalle-pytorch 1.6.6 (`make
bench-end-to-end` installs it; its feed-forward layers are gated and half as wide again, its output layer spans text and
image).
"""

from __future__ import annotations

import copy
import importlib
import sys
import time
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F

import dalle_fast as df
from dalle_fast.config import PRESETS, DALLEConfig
from dalle_fast.sampling import Repeat

CONFIG = DALLEConfig(d_model=512, n_layer=12)
PICTURES = 64
STEPS = 32  # codes of each picture in the race with dalle-pytorch, which takes long for all 1,024
BATCH = 2  # pairs of a training step
CONFIG_CUDA = PRESETS["1.2B"].dalle
PICTURES_CUDA, AT_ONCE = 512, 128  # all pictures; those whose full caches an 80 GB GPU has room for
BATCH_CUDA = 4


def make_model(config: DALLEConfig = CONFIG, device: str = "cpu") -> df.DALLE:
    torch.manual_seed(0)
    with torch.device(device):
        return df.DALLE(config).eval()


def make_text(n: int) -> torch.Tensor:
    return torch.randint(CONFIG.text_vocab, (n, CONFIG.text_len), generator=torch.Generator().manual_seed(1))


def make_codes(n: int) -> torch.Tensor:
    shape = (n, CONFIG.height, CONFIG.width)
    return torch.randint(CONFIG.image_vocab, shape, generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------------------------------ peers


class TorchAttention(torch.nn.Module):
    """Our attention layer's weights, on torch's attention with the mask as a tensor."""

    def __init__(self, ours: torch.nn.Module) -> None:
        super().__init__()
        self.ours = ours
        self.register_buffer("dense", ours.mask.dense(ours.qkv.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.ours.heads(x)
        return self.ours.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=self.dense))

    def prefill(self, x: torch.Tensor) -> torch.Tensor:
        """Text of all candidates; starts the cache of the whole stream."""
        q, k, v = self.ours.heads(x, sampling=True)
        room = (len(q), q.shape[1], len(self.dense), q.shape[3])
        self.cache_k, self.cache_v = q.new_zeros(room), q.new_zeros(room)
        self.cache_k[:, :, : q.shape[2]], self.cache_v[:, :, : q.shape[2]] = k, v
        return self.ours.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True), sampling=True)

    def decode_anywhere(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """At an index [1] that only the device knows: attends to the whole cache, most of it masked."""
        q, k, v = self.ours.heads(x, sampling=True)
        self.cache_k.index_copy_(2, at, k)
        self.cache_v.index_copy_(2, at, v)
        return self.ours.merge(
            F.scaled_dot_product_attention(q, self.cache_k, self.cache_v, attn_mask=self.dense[at]), sampling=True
        )

    def decode(self, x: torch.Tensor, at: int) -> torch.Tensor:
        q, k, v = self.ours.heads(x, sampling=True)
        self.cache_k[:, :, at : at + 1], self.cache_v[:, :, at : at + 1] = k, v
        k, v = self.cache_k[:, :, : at + 1], self.cache_v[:, :, : at + 1]
        return self.ours.merge(
            F.scaled_dot_product_attention(q, k, v, attn_mask=self.dense[at : at + 1, : at + 1]), sampling=True
        )


def on_torch_attention(model: df.DALLE) -> df.DALLE:
    peer = copy.deepcopy(model)
    for layer in peer.layers:
        layer.attn = TorchAttention(layer.attn)
    return peer


@torch.no_grad()
def torch_generate(model: df.DALLE, text: torch.Tensor) -> torch.Tensor:
    """Sampling as it is usually written: a full cache, torch's attention, torch.multinomial."""
    model.renew_packed_weights()
    x = model.embed_text(text)
    for layer in model.layers:
        x = x + layer.attn.prefill(layer.attn_norm(x))
        x = x + layer.sampling_mlp(layer.mlp_norm(x))
    drawn = []
    for i in range(model.cfg.image_len):
        logits = model.to_image.sampling(model.norm(x[:, -1]))
        drawn.append(torch.multinomial(logits.softmax(-1), 1))
        x = model.embed_image(drawn[-1], torch.tensor([i]))
        for layer in model.layers:
            x = x + layer.attn.decode(layer.attn_norm(x), model.cfg.text_len + i)
            x = x + layer.sampling_mlp(layer.mlp_norm(x))
    return torch.cat(drawn, 1)


@torch.no_grad()
def torch_generate_captured(model: df.DALLE, text: torch.Tensor) -> torch.Tensor:
    """The same on a GPU, a step at a time from one CUDA graph."""
    x = model.embed_text(text)
    for layer in model.layers:
        x = x + layer.attn.prefill(layer.attn_norm(x))
        x = x + layer.mlp(layer.mlp_norm(x))
    position = torch.zeros(1, dtype=torch.int64, device=x.device)
    codes = torch.zeros(len(text), model.cfg.image_len, dtype=torch.int64, device=x.device)

    def choose(x: torch.Tensor) -> None:
        probabilities = model.to_image(model.norm(x[:, -1])).float().softmax(-1)
        # The largest of p / e, with exponential e, is a draw from p; torch.multinomial would wait for the device.
        drawn = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1, keepdim=True)
        codes.index_copy_(1, position, drawn)

    def step() -> None:
        x = model.embed_image(codes.index_select(1, position), position)
        for layer in model.layers:
            x = x + layer.attn.decode_anywhere(layer.attn_norm(x), model.cfg.text_len + position)
            x = x + layer.mlp(layer.mlp_norm(x))
        position.add_(1)
        choose(x)

    choose(x)
    Repeat(step, x.device).run(model.cfg.image_len - 1)
    for layer in model.layers:
        del layer.attn.cache_k, layer.attn.cache_v  # tens of GB
    return codes


def dalle_pytorch_model(attn_types: tuple[str, ...], sampling: bool) -> torch.nn.Module | None:
    """dalle-pytorch at our size, or None where it is not installed.

    Its tokenizers and pretrained VAEs want packages that these measurements never touch: stand-ins take their place.
    """
    for name in ("transformers", "youtokentome", "taming.models.vqgan", "omegaconf", "torchvision.transforms", "regex",
                 "ftfy", "requests", "pkg_resources", "yaml"):  # fmt: skip
        parts = name.split(".")
        try:
            importlib.import_module(name)
        except ImportError:
            for i in range(len(parts)):
                sys.modules.setdefault(".".join(parts[: i + 1]), MagicMock())
    try:
        dalle_pytorch = importlib.import_module("dalle_pytorch")
    except ImportError:
        return None
    torch.manual_seed(0)
    vae = dalle_pytorch.DiscreteVAE(
        image_size=2 * CONFIG.width, num_layers=1, num_tokens=CONFIG.image_vocab, codebook_dim=8, hidden_dim=8
    )
    model = dalle_pytorch.DALLE(
        dim=CONFIG.d_model, vae=vae, num_text_tokens=CONFIG.text_vocab, text_seq_len=CONFIG.text_len,
        depth=CONFIG.n_layer, heads=CONFIG.n_head, dim_head=CONFIG.head_dim, attn_types=attn_types,
        optimize_for_inference=sampling,
    )  # fmt: skip
    return model


DALLE_PYTORCH = {"full": ("full",), "axial": ("axial_row", "axial_col")}


# ------------------------------------------------------------------------------------------ races


@torch.no_grad()
def check_decoding(model: df.DALLE, text: torch.Tensor, atol: float, whole: df.DALLE | None = None) -> None:
    """Feeding codes one by one must give the logits of the whole stream; in 16 bits those of the model in float32."""
    codes = make_codes(2).to(text.device)
    _, expected = (whole or model)(text.expand(2, -1), codes)
    logits, caches = model.prefill(text, 2)
    torch.testing.assert_close(logits.expand(2, -1).float(), expected[:, 0], rtol=0, atol=atol)
    for i in range(2 * CONFIG.width):
        logits = model.decode(codes.flatten(1)[:, i], torch.tensor(i, device=text.device), caches)
        torch.testing.assert_close(logits.float(), expected[:, i + 1], rtol=0, atol=atol)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_sampling(race, weights):
    model = make_model().pack(weights)
    text = make_text(1)
    peers = {}
    if weights == "float32":  # the peer runs once
        peer = on_torch_attention(model)
        peers["torch SDPA, full cache"] = lambda: torch_generate(peer, text.expand(PICTURES, -1))
    check_decoding(model, text, atol=1e-3 if weights == "float32" else 0.05)
    race(
        f"{PICTURES} pictures, {weights} weights",
        lambda: model.generate(text, PICTURES),
        peers,
        expected=None,
        targets={"torch SDPA, full cache": 3.0},
        rounds=1,
        warm=False,
    )


@torch.no_grad()
def test_steps(race):
    """The first codes after the prompt, where dalle-pytorch's caches, which grow with every code, are smallest."""
    model, text = make_model().pack(), make_text(1)
    check_decoding(model, text, atol=1e-3)
    _, caches = model.prefill(text, PICTURES)
    code = make_codes(PICTURES)[:, 0, 0]

    def ours():
        for i in range(STEPS):
            df.sample(model.decode(code, torch.tensor(i), caches), seed=0, first=i)

    def dalle_pytorch_steps(other):
        cache: dict = {}
        prompts = text.expand(PICTURES, -1)
        other(prompts, cache=cache)
        image = code[:, None]

        def steps():
            nonlocal image
            for _ in range(STEPS):
                logits = other(prompts, image, cache=cache)[:, -1, CONFIG.text_vocab + CONFIG.text_len :]
                image = torch.cat([image, torch.multinomial(logits.softmax(-1), 1)], 1)

        return steps

    peers = {}
    for name, types in DALLE_PYTORCH.items():
        if (other := dalle_pytorch_model(types, sampling=True)) is not None:
            peers[f"dalle-pytorch {name}"] = dalle_pytorch_steps(other.eval())
    race(f"first {STEPS} codes of {PICTURES} pictures", ours, peers, expected=None, rounds=1, warm=False)


def trainer(model, loss):
    """A function that makes one update of the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def test_training(race):
    model = make_model().train()
    text, codes = make_text(BATCH), make_codes(BATCH)

    peer = on_torch_attention(model)
    peers = {"torch SDPA, mask tensor": trainer(peer, lambda: peer.loss(text, codes)[0])}
    for name, types in DALLE_PYTORCH.items():
        if (other := dalle_pytorch_model(types, sampling=False)) is not None:
            loss = lambda other=other: other(text, codes.flatten(1), return_loss=True)  # noqa: E731
            peers[f"dalle-pytorch {name}"] = trainer(other, loss)
    with torch.no_grad():
        expected = peer.loss(text, codes)[0]
    race(
        f"training step, batch {BATCH}",
        trainer(model, lambda: model.loss(text, codes)[0]),
        peers,
        expected=expected,
        targets={"torch SDPA, mask tensor": 1.25},
        rounds=2,
    )


def test_cuda_sampling(race, record):
    """The race is of as many pictures as the peer's caches have room for; for more it takes as many times as long."""
    model, text = make_model(CONFIG_CUDA, "cuda").to(torch.bfloat16), make_text(1).cuda()
    check_decoding(model, text, atol=0.2, whole=make_model(CONFIG_CUDA, "cuda"))
    peer = on_torch_attention(model)

    race(
        f"{AT_ONCE} pictures, 1.2B, bfloat16",
        lambda: model.generate(text, AT_ONCE),
        {"torch SDPA, CUDA graphs": lambda: torch_generate_captured(peer, text.expand(AT_ONCE, -1))},
        expected=None,
        rounds=1,
        warm=False,
        capture=False,
    )
    start = time.perf_counter()
    model.generate(text, PICTURES_CUDA)  # waits for the device
    record(f"{PICTURES_CUDA} pictures, 1.2B, bfloat16", time.perf_counter() - start)


def test_cuda_training(race):
    """GFLOP/s are those of the model (6 a parameter and token, and attention), so that their share is the MFU."""
    model = make_model(CONFIG_CUDA, "cuda").train()
    text, codes = make_text(BATCH_CUDA).cuda(), make_codes(BATCH_CUDA).cuda()
    peer = on_torch_attention(model)

    def loss(model):
        with torch.autocast("cuda", torch.bfloat16):
            return model.loss(text, codes)[0]

    with torch.no_grad():
        expected = loss(peer)
    cfg = model.cfg
    blocks = sum(parameter.numel() for parameter in model.layers.parameters()) * (cfg.text_len + cfg.image_len)
    heads = model.to_text.weight.numel() * cfg.text_len + model.to_image.weight.numel() * cfg.image_len
    pairs = sum(int(layer.attn.mask.dense().sum()) for layer in model.layers)
    race(
        f"training step, 1.2B, batch {BATCH_CUDA}",
        trainer(model, lambda: loss(model)),
        {"torch SDPA, mask tensor": trainer(peer, lambda: loss(peer))},
        expected=expected,
        flops=BATCH_CUDA * (6 * (blocks + heads) + 12 * pairs * cfg.d_model),
        rounds=3,
        capture=False,
        rtol=1e-2,
        atol=1e-2,
    )
