"""Commands that train the four parts of a system."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import PRESETS, CLIPConfig, DALLEConfig, DVAEConfig
from ..training.settings import TRAIN_PRESETS, TrainCLIP, TrainDALLE, TrainDVAE
from .common import HeldOut, Preset, Source, System, open_source

if TYPE_CHECKING:
    from ..data import EncodedPairs, Pairs


def training_commands(preset: str) -> dict[str, Any]:
    """The commands of ``train``, with the values of a preset as defaults."""
    sizes, settings = PRESETS[preset], TRAIN_PRESETS[preset]

    def tokenizer(
        data: Source,
        out: System,
        preset: Preset = "tiny",
        vocab_size: int = sizes.dalle.text_vocab,
        text_len: int = sizes.dalle.text_len,
    ) -> None:
        """Learn the text vocabulary from captions. The first of the four to train.

        Args:
            vocab_size: Text tokens, the 256 bytes included.
            text_len: Tokens of a caption, padding included.
        """
        from ..training import train_tokenizer

        pairs = open_source(data)
        train_tokenizer(pairs.captions(), out, vocab_size, text_len)
        print(f"{out / 'tokenizer.json'}: {vocab_size} tokens from {len(pairs)} captions")

    def dvae(
        data: Source,
        out: System,
        val: HeldOut = None,
        preset: Preset = "tiny",
        model: DVAEConfig = sizes.dvae,
        train: TrainDVAE = settings.dvae,
    ) -> None:
        """Learn image codes (stage 1)."""
        from ..training import train_dvae

        _, metrics = train_dvae(open_source(data), val and open_source(val), model, train, out)
        _print_metrics(out / "dvae.safetensors", metrics)

    def clip(
        data: Source,
        out: System,
        val: HeldOut = None,
        preset: Preset = "tiny",
        model: CLIPConfig = sizes.clip,
        train: TrainCLIP = settings.clip,
    ) -> None:
        """Learn which caption fits which image, to choose among candidates. Needs the tokenizer."""
        from ..pipeline import load_tokenizer
        from ..training import train_clip

        _, metrics = train_clip(open_source(data), val and open_source(val), load_tokenizer(out), model, train, out)
        _print_metrics(out / "clip.safetensors", metrics)

    def dalle(
        data: Source,
        out: System,
        val: HeldOut = None,
        preset: Preset = "tiny",
        model: DALLEConfig = sizes.dalle,
        train: TrainDALLE = settings.dalle,
    ) -> None:
        """Learn to continue captions with image codes (stage 2). Needs the tokenizer and the dVAE.

        The sources may also be folders that ``encode`` wrote.
        """
        from ..pipeline import load_dvae, load_tokenizer
        from ..training import train_dalle

        tokenizer, vae = load_tokenizer(out), load_dvae(out)
        sources = {source: _open_or_encoded(source) for source in (data, val) if source}
        _check_codes(sources, out)
        _, metrics = train_dalle(sources[data], val and sources[val], tokenizer, model, train, out, vae)
        _print_metrics(out / "dalle.safetensors", metrics)

    return {"tokenizer": tokenizer, "dvae": dvae, "clip": clip, "dalle": dalle}


def _open_or_encoded(source: str) -> Pairs | EncodedPairs:
    """A source of images, or of codes."""
    from ..data import EncodedPairs

    encoded = any((Path(source) / name).is_file() for name in ("meta.json", "settings.json"))
    return EncodedPairs(source) if encoded else open_source(source)


def _check_codes(sources: Mapping[str, Pairs | EncodedPairs], system: Path) -> None:
    """Raise ValueError where there are codes that the dVAE of this system has not made."""
    from ..data import EncodedPairs
    from ..pipeline import fingerprint

    made_by = {source: pairs.fingerprint for source, pairs in sources.items() if isinstance(pairs, EncodedPairs)}
    expected = fingerprint(system, "dvae") if made_by else None
    for source, got in made_by.items():
        if got != expected:
            raise ValueError(f"data: expected codes of the dVAE in {system}, got another dVAE's in {source}")


def _print_metrics(path: Path, metrics: dict[str, float]) -> None:
    from ..distributed.world import this_process

    rank, _ = this_process()
    if rank == 0:
        print(f"{path}: " + ", ".join(f"{name} {value:.5g}" for name, value in metrics.items()))
