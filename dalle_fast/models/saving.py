"""Models in safetensors files, with kind and sizes in the header."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..config import CLIPConfig, DALLEConfig, DVAEConfig
from ..files import write_atomically
from .clip import CLIP
from .dvae import DiscreteVAE
from .transformer import DALLE

KINDS: dict[str, tuple[type[nn.Module], type]] = {
    "dvae": (DiscreteVAE, DVAEConfig),
    "dalle": (DALLE, DALLEConfig),
    "clip": (CLIP, CLIPConfig),
}


def kind_of(model: nn.Module) -> str:
    """Kind of a model: "dvae", "dalle" or "clip"."""
    return next(kind for kind, (cls, _) in KINDS.items() if isinstance(model, cls))


def save_model(model: nn.Module, path: str | Path, half: bool = False) -> None:
    """Write a model to a safetensors file, complete or not at all.

    ``half`` stores the parameters in float16; loading converts them to float32.
    """
    dtype = torch.float16 if half else torch.float32
    # Untied and contiguous: safetensors refuses shared memory.
    tensors = {name: p.detach().to("cpu", dtype, copy=True).contiguous() for name, p in model.state_dict().items()}
    metadata = {"kind": kind_of(model), "config": json.dumps(asdict(cast(Any, model).cfg))}
    write_atomically(path, lambda file: save_file(tensors, file, metadata))


def load_model(path: str | Path, kind: str | None = None) -> Any:
    """Read a model written by ``save_model``, in eval mode and float32, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or a model of another kind than expected.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"model: expected a file, found none at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"model: expected a safetensors file, got {path} ({error})") from error
    if metadata.get("kind") not in KINDS or kind not in (None, metadata["kind"]):
        raise ValueError(f"model: expected kind {kind or '/'.join(KINDS)} in {path}, got {metadata.get('kind')!r}")
    model_class, config_class = KINDS[metadata["kind"]]
    sizes = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(metadata["config"]).items()}
    model = model_class(config_class(**sizes))
    model.load_state_dict(tensors)
    return model.eval()
