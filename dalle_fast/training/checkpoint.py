"""Checkpoints: everything a run needs to go on bit by bit as if it had never stopped."""

from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every global random number generator."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - others may draw from it
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what ``random_state`` returned."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint so that, whenever the machine stops, the file is the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the new name last, too
    finally:
        os.close(folder)


def load_checkpoint(path: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint of the run that ``fingerprint`` describes.

    Raises:
        ValueError: no checkpoint, or one of another model or of other data; the message names what differs.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["fingerprint"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint: expected one of this program, got {path} ({error})") from error
    differing = [name for name in sorted(fingerprint.keys() | found.keys()) if fingerprint.get(name) != found.get(name)]
    if differing:
        expected = ", ".join(f"{name}={fingerprint.get(name)}" for name in differing)
        got = ", ".join(f"{name}={found.get(name)}" for name in differing)
        raise ValueError(f"checkpoint {path}: expected {expected}, got {got}; choose another folder or resume nothing")
    return content
