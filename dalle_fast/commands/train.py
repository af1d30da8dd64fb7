"""Commands that train the four parts of a system."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import PRESETS, CLIPConfig, DALLEConfig, DVAEConfig
from ..training.settings import TRAIN_PRESETS, TrainCLIP, TrainDALLE, TrainDVAE
from .common import HeldOut, Preset, Source, System, open_source

if TYPE_CHECKING:
    from torch import nn

    from ..data import EncodedPairs, Pairs


def training_commands(preset: str) -> dict[str, Any]:
    """The commands of ``train``, with the values of a preset as defaults."""
    sizes, settings = PRESETS[preset], TRAIN_PRESETS[preset]
    return {
        "tokenizer": partial(tokenizer, vocab_size=sizes.dalle.text_vocab, text_len=sizes.dalle.text_len),
        "dvae": partial(dvae, model=sizes.dvae, train=settings.dvae),
        "clip": partial(clip, model=sizes.clip, train=settings.clip),
        "dalle": partial(dalle, model=sizes.dalle, train=settings.dalle),
    }


def tokenizer(data: Source, out: System, vocab_size: int, text_len: int, preset: Preset = "tiny") -> None:
    """Learn the text vocabulary from captions: the first of the four parts.

    Args:
        vocab_size: Text tokens, including the 256 bytes.
        text_len: Tokens per caption, including padding.
    """
    from ..training import train_tokenizer

    pairs = open_source(data)
    train_tokenizer(pairs.captions(), out, vocab_size, text_len)
    print(f"{out / 'tokenizer.json'}: {vocab_size} tokens from {len(pairs)} captions")


def dvae(
    data: Source, out: System, model: DVAEConfig, train: TrainDVAE, val: HeldOut = None, preset: Preset = "tiny"
) -> None:
    """Train the discrete VAE, which turns images into codes and back (stage 1)."""
    from ..distributed.world import check_device
    from ..training import train_dvae

    check_device(train.device)
    _report(out / "dvae.safetensors", train_dvae(*_open(data, val), model, train, out))


def clip(
    data: Source, out: System, model: CLIPConfig, train: TrainCLIP, val: HeldOut = None, preset: Preset = "tiny"
) -> None:
    """Train CLIP, which ranks generated images by how well they match a caption. Needs the tokenizer."""
    from ..distributed.world import check_device
    from ..pipeline import load_tokenizer
    from ..training import train_clip

    check_device(train.device)
    tokenizer = load_tokenizer(out)
    _report(out / "clip.safetensors", train_clip(*_open(data, val), tokenizer, model, train, out))


def dalle(
    data: Source, out: System, model: DALLEConfig, train: TrainDALLE, val: HeldOut = None, preset: Preset = "tiny"
) -> None:
    """Train the transformer, which continues a caption with image codes (stage 2). Needs the tokenizer and the dVAE.

    The sources may also be folders written by ``encode``.
    """
    from ..distributed.world import check_device
    from ..pipeline import load_dvae, load_tokenizer
    from ..training import train_dalle

    check_device(train.device)
    tokenizer, dvae = load_tokenizer(out), load_dvae(out)
    sources = {source: _open_images_or_codes(source) for source in (data, val) if source}
    _check_codes(sources, out)
    trained = train_dalle(sources[data], val and sources[val], tokenizer, model, train, out, dvae)
    _report(out / "dalle.safetensors", trained)


def _open(data: str, val: str | None) -> tuple[Pairs, Pairs | None]:
    return open_source(data), open_source(val) if val else None


def _open_images_or_codes(source: str) -> Pairs | EncodedPairs:
    from ..data import EncodedPairs

    encoded = any((Path(source) / name).is_file() for name in ("meta.json", "settings.json"))
    return EncodedPairs(source) if encoded else open_source(source)


def _check_codes(sources: Mapping[str, Pairs | EncodedPairs], system: Path) -> None:
    """Raise ValueError if any codes were made by another dVAE than that of the system."""
    from ..data import EncodedPairs
    from ..pipeline import fingerprint

    made_by = {source: pairs.fingerprint for source, pairs in sources.items() if isinstance(pairs, EncodedPairs)}
    expected = fingerprint(system, "dvae") if made_by else None
    for source, got in made_by.items():
        if got != expected:
            raise ValueError(f"data: expected codes of the dVAE in {system}, got another dVAE's in {source}")


def _report(path: Path, trained: tuple[nn.Module, dict[str, float]]) -> None:
    """Print the metrics of a training, once if there are many processes."""
    from ..distributed.world import this_process

    _, metrics = trained
    rank, _ = this_process()
    if rank == 0:
        print(f"{path}: " + ", ".join(f"{name} {value:.5g}" for name, value in metrics.items()))
