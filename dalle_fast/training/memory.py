"""How much memory there is, and keeping what training frees, for the next step will want it again."""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_freed_memory() -> bool:
    """Have the C library reuse freed memory instead of giving it back to the system; whether that was possible.

    Large tensors are otherwise mapped anew in every step, and touching new pages costs about a third of a step of a
    small model on a CPU. Only glibc knows how; elsewhere this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(what, 2**30) for what in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def available_memory(device: torch.device) -> float:
    """Bytes that a device could still give; infinite where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.exists() else []
    sizes = [float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] if sizes and device.type == "cpu" else math.inf
