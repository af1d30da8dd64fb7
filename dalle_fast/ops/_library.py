"""Loads the compiled ops and decides between them and the references: the one place where that happens."""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Backend:
    """What this install computes with; ``str()`` is meant for people.

    Args:
        devices: device types that have kernels, such as ``("cpu",)``; empty when the references run.
        reasons: why a device type has them or not, by type.
        reference: why the references run instead of the kernels, or None.
    """

    devices: tuple[str, ...]
    reasons: dict[str, str]
    reference: str | None = None

    def __str__(self) -> str:
        lines = [
            f"{device}: {'yes' if device in self.devices else 'no'} ({why})" for device, why in self.reasons.items()
        ]
        return "\n".join(lines if self.reference is None else [*lines, f"reference: {self.reference}"])


def _load() -> Backend:
    """Load ``_C``, or say why the references run.

    Raises:
        ImportError: the binary is there and does not load; names the cause.
    """
    if os.environ.get("DALLE_FAST_REFERENCE", "0") not in ("", "0"):
        why = "forced by DALLE_FAST_REFERENCE"
        return Backend((), {"cpu": why, "cuda": why}, why)
    package = importlib.import_module("dalle_fast")
    if importlib.machinery.PathFinder.find_spec("dalle_fast._C", package.__path__) is None:
        why = "dalle_fast._C is not built; run: pip install --no-build-isolation -e ."
        warnings.warn(f"dalle_fast runs its slow reference ops: {why}", stacklevel=2)
        return Backend((), {"cpu": why, "cuda": why}, why)
    try:
        simd = importlib.import_module("dalle_fast._C").SIMD
        build = importlib.import_module("dalle_fast._build_info")
    except (ImportError, OSError) as error:
        raise ImportError(
            f"dalle_fast._C is built but does not load with torch {torch.__version__}: {error}. "
            "Rebuild it: pip install --no-build-isolation --force-reinstall --no-deps ."
        ) from error
    devices = ("cpu", "cuda") if build.CUDA else ("cpu",)
    return Backend(devices, {"cpu": f"{simd}, built with torch {build.TORCH_VERSION}", "cuda": build.CUDA_REASON})


_BACKEND = _load()


def backend() -> Backend:
    """Which kernels this install has, and why not the others."""
    return _BACKEND


def kernels_loaded() -> bool:
    """Whether the compiled ops exist, so that fakes and gradients can be registered on them."""
    return _BACKEND.reference is None


def reference_op(name: str, device: torch.device) -> Callable[..., Any] | None:
    """The fallback switch: the reference of op ``name`` if it must run in place of the kernel, else None.

    Raises:
        RuntimeError: the kernels are loaded, but have none for ``device``.
    """
    if _BACKEND.reference is not None:
        return getattr(importlib.import_module("dalle_fast.reference"), name)
    if device.type not in (*_BACKEND.devices, "meta"):
        why = _BACKEND.reasons.get(device.type, "never built for it")
        raise RuntimeError(f"{name}: this install has no kernel for {device.type}: {why}")
    return None
