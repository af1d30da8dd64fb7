"""Keeping memory that training frees, for the next step will want it again."""

from __future__ import annotations

import ctypes
import sys

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
