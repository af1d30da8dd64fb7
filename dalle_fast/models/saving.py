"""Models in safetensors files, with kind, sizes and the parts that they were trained with in the header.

A file is checked before anything of its size is allocated: first the config, then names, shapes and dtypes of the
tensors against the model on the device "meta", and each tensor when it is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
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
DTYPES = ("F64", "F32", "F16", "BF16")  # of stored parameters
TRAINED_WITH = "trained_with "  # in front of the names of parts in the header
SHOWN = 60  # characters of a value in a message


def kind_of(model: nn.Module) -> str:
    """Kind of a model: "dvae", "dalle" or "clip"."""
    return next(kind for kind, (cls, _) in KINDS.items() if isinstance(model, cls))


def hash_of(model: nn.Module) -> str:
    """Hash of a model's parameters, rounded to float16: the same for a file in half precision."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy().data)
    return digest.hexdigest()


def save_model(model: nn.Module, path: str | Path, half: bool = False) -> None:
    """Write a model to a safetensors file, complete or not at all.

    ``half`` stores the parameters in float16; loading converts them to float32.
    """
    dtype = torch.float16 if half else torch.float32
    # Untied and contiguous: safetensors refuses shared memory.
    tensors = {name: p.detach().to("cpu", dtype, copy=True).contiguous() for name, p in model.state_dict().items()}
    metadata = {"kind": kind_of(model), "config": json.dumps(asdict(cast(Any, model).cfg))}
    metadata |= {TRAINED_WITH + part: value for part, value in cast(Any, model).trained_with.items()}
    write_atomically(path, lambda file: save_file(tensors, file, metadata))


def load_model(path: str | Path, kind: str | None = None) -> Any:
    """Read a model written by ``save_model``, in eval mode and float32, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a model of another kind than expected, or a file whose config and tensors do
            not make a model; the message names the file and the item.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"model: expected a file, found none at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") not in KINDS or kind not in (None, metadata["kind"]):
                got = _shown(metadata.get("kind"))
                raise ValueError(f"model: expected kind {kind or '/'.join(KINDS)} in {path}, got {got}")
            # Parameters are ordinary tensors, whatever mode the caller is in: they may be trained.
            with torch.inference_mode(False), torch.no_grad():
                return _read(file, path, metadata)
    except SafetensorError as error:
        raise ValueError(f"model: expected a safetensors file, got {path} ({error})") from error


def _read(file: Any, path: str | Path, metadata: Mapping[str, str]) -> nn.Module:
    model_class, config_class = KINDS[metadata["kind"]]
    names = list(file.keys())
    cfg = _config(config_class, metadata.get("config"), path)
    _check_depth(cfg, len(names), path)
    try:
        with torch.device("meta"):
            model = model_class(cfg).float()
    except (RuntimeError, OverflowError) as error:  # the number of bytes of a tensor does not fit 64 bits
        raise ValueError(f"{path}: config: expected sizes that fit the file, got {_shown(asdict(cfg))}") from error
    expected = model.state_dict()
    for name in sorted(expected.keys() - names):
        raise ValueError(f"{path}: {name}: expected a tensor {[*expected[name].shape]}, got none")
    for name in names:
        if name not in expected:
            raise ValueError(f"{path}: {_shown(name)}: expected no such tensor in a model of this config, got one")
        stored = file.get_slice(name)
        if stored.get_shape() != [*expected[name].shape]:
            raise ValueError(f"{path}: {name}: expected shape {[*expected[name].shape]}, got {stored.get_shape()}")
        if stored.get_dtype() not in DTYPES:
            raise ValueError(f"{path}: {name}: expected one of {', '.join(DTYPES)}, got {stored.get_dtype()}")
    model.to_empty(device="cpu")
    for name, parameter in model.state_dict().items():
        parameter.copy_(file.get_tensor(name))
        if not parameter.isfinite().all():
            bad = parameter[~parameter.isfinite()].flatten()
            raise ValueError(f"{path}: {name}: expected finite values, got {bad[0].item()} and {len(bad) - 1} more")
    trained_with = {k.removeprefix(TRAINED_WITH): v for k, v in metadata.items() if k.startswith(TRAINED_WITH)}
    cast(Any, model).trained_with = trained_with
    return model.eval()


def _config(config_class: type, text: str | None, path: str | Path) -> Any:
    """The config in a header, checked."""
    try:
        config = json.loads(text or "")
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: config: expected a JSON object, got {_shown(text)}")
    known = [field.name for field in fields(config_class)]
    for name in sorted(config.keys() - known):
        raise ValueError(f"{path}: config: expected {', '.join(known)}, got {_shown(name)}, too")
    for name in known:
        if name not in config:
            raise ValueError(f"{path}: config: expected {name}, got none")
    try:
        return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
    except ValueError as error:
        raise ValueError(f"{path}: config: {error}") from None


def _check_depth(cfg: Any, tensors: int, path: str | Path) -> None:
    """Raise ValueError if a config has more layers than there are tensors: even on "meta" each takes memory."""
    if isinstance(cfg, DVAEConfig):
        name, layers = "n_blk_per_group", len(cfg.groups) * cfg.n_blk_per_group
    elif isinstance(cfg, DALLEConfig):
        name, layers = "n_layer", cfg.n_layer
    else:
        name, layers = "vision_layers + text_layers", cfg.vision_layers + cfg.text_layers
    # A layer of the transformers has 12 tensors; a resblock of the dVAE has 8, in the encoder and in the decoder.
    if 12 * layers > tensors:
        raise ValueError(f"{path}: config: expected {name} that fit {tensors} tensors, got {layers} layers")


def _shown(value: Any) -> str:
    """The value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
