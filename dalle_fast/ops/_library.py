"""Loads the compiled ops and decides, for each op and device, whether they or the references run."""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference

Function = TypeVar("Function", bound=Callable[..., Any])

# Ops whose CUDA kernels have passed the tests on a GPU: none yet. The others are compiled but off, and their references
# run on CUDA tensors, unless DALLE_FAST_UNVERIFIED=1.
VERIFIED_ON_CUDA: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Backend:
    """The kernels of this install; ``str()`` is meant for people.

    Args:
        devices: device types that have kernels, such as ``("cpu",)``; empty when the references run.
        reasons: by device type, why it has kernels or not.
        reference: why the references run instead of the kernels, or None.
        cuda_ops: ops whose CUDA kernels are on; for the others, references run on CUDA tensors.
        unverified: ops whose CUDA kernels have not been run on a GPU yet.
    """

    devices: tuple[str, ...]
    reasons: dict[str, str]
    reference: str | None = None
    cuda_ops: frozenset[str] = frozenset()
    unverified: frozenset[str] = frozenset()

    def __str__(self) -> str:
        lines = [
            f"{device}: {'yes' if device in self.devices else 'no'} ({why})" for device, why in self.reasons.items()
        ]
        for on, state in ((False, "off (DALLE_FAST_UNVERIFIED=1 switches them on)"), (True, "on")):
            if names := sorted(name for name in self.unverified if (name in self.cuda_ops) == on):
                lines.append(f"cuda kernels not yet run on a GPU, {state}: {', '.join(names)}")
        return "\n".join(lines if self.reference is None else [*lines, f"reference: {self.reference}"])


def _cuda_kernels() -> frozenset[str]:
    """Names of the compiled ops that have a CUDA kernel, without their backwards."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("dalle_fast::"))
    found = (name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"))
    return frozenset(name.split("::")[1] for name in found if not name.endswith("_backward"))


def _load() -> Backend:
    """Load ``_C``, or say why the references run.

    Raises:
        ImportError: the binary exists and does not load; names the cause.
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
    reasons = {"cpu": f"{simd}, built with torch {build.TORCH_VERSION}", "cuda": build.CUDA_REASON}
    if not build.CUDA:
        return Backend(("cpu",), reasons)
    unverified = _cuda_kernels() - VERIFIED_ON_CUDA
    switched_on = os.environ.get("DALLE_FAST_UNVERIFIED", "0") not in ("", "0")
    cuda_ops = VERIFIED_ON_CUDA | unverified if switched_on else VERIFIED_ON_CUDA
    return Backend(("cpu", "cuda"), reasons, cuda_ops=cuda_ops, unverified=unverified)


_BACKEND = _load()
_LIBRARY = torch.library.Library("dalle_fast", "FRAGMENT")  # holds the registrations of this file


def backend() -> Backend:
    """The kernels that this install has, and why not the others."""
    return _BACKEND


def waits_on_host(op: str, device: torch.device) -> bool:
    """Whether the host waits for ``device`` in ``op``: its reference runs there, which reads values on the host.

    Such a call cannot be recorded as a CUDA graph.

    Raises:
        RuntimeError: this install has no kernel for ``device``.
    """
    return reference_op(op, device) is not None


def reference_op(name: str, device: torch.device) -> Callable[..., Any] | None:
    """The reference of op ``name`` if it runs in place of the kernel, else None.

    Raises:
        RuntimeError: the kernels are loaded, but there is none for ``device``.
    """
    off_on_cuda = device.type == "cuda" and "cuda" in _BACKEND.devices and name not in _BACKEND.cuda_ops
    if _BACKEND.reference is not None or off_on_cuda:
        return getattr(reference, name)
    if device.type not in _BACKEND.devices and device.type != "meta":
        why = _BACKEND.reasons.get(device.type, "never built for it")
        raise RuntimeError(f"{name}: this install has no kernel for {device.type}: {why}")
    return None


def register_fake(op: str) -> Callable[[Function], Function]:
    """Decorator: ``torch.library.register_fake``, or nothing where the compiled ops are missing."""
    return torch.library.register_fake(f"dalle_fast::{op}") if _kernels_loaded() else lambda fake: fake


def register_autograd(op: str, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
    """``torch.library.register_autograd``, or nothing where the compiled ops are missing.

    ``backward`` runs the op ``<op>_backward``, which refuses to be differentiated.
    """
    if _kernels_loaded():
        torch.library.register_autograd(f"dalle_fast::{op}", backward, setup_context=setup_context)
    refuse_derivatives(f"{op}_backward", f"{op}: differentiable once")


def refuse_derivatives(op: str, message: str) -> None:
    """Make an op raise RuntimeError where torch would take its derivative, in place of one that is silently 0."""
    if not _kernels_loaded():
        return
    overload = getattr(torch.ops.dalle_fast, op).default

    def compute(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class NotDifferentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return compute(*args)

        @staticmethod
        def backward(ctx: Any, *_: Any) -> Any:
            raise RuntimeError(message)

    # torch.library.register_autograd takes no op that writes to an argument, such as a flag.
    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        refuse_forward_mode(message, *args)
        needs_grad = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
        return (NotDifferentiable.apply if needs_grad else compute)(keyset, *args)

    _LIBRARY.impl(op, kernel, "Autograd", with_keyset=True)


def refuse_forward_mode(message: str, *args: Any) -> None:
    """Raise RuntimeError if an argument has a forward-mode tangent, which no kernel takes along."""
    if forward_ad._current_level < 0:  # as in most calls
        return
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args):
        raise RuntimeError(f"{message}, and not in forward mode")


def refuse_gradients(op: str, *args: Tensor | None) -> None:
    """Raise RuntimeError if an argument needs derivatives, for an op that has none."""
    refuse_forward_mode(f"{op}: no gradients", *args)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
        raise RuntimeError(f"{op} has no gradients: call it under torch.no_grad()")


def _kernels_loaded() -> bool:
    return _BACKEND.reference is None
