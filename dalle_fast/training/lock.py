"""A lock that keeps two trainings out of one folder."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = "lock"
_held: set[int] = set()  # descriptors of the locks of this process


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. The kernel releases it when the process ends, however it does.

    Nodes that share the folder exclude each other as far as their file system supports ``flock`` between nodes: NFS
    does, unless it is mounted with ``nolock`` or ``local_lock``. Where there are no locks at all, a warning says so.

    Raises:
        ValueError: another process holds it; with the folder, the process and its node.
    """
    path = folder / LOCK_FILE
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "unknown"
            raise ValueError(
                f"out: expected a folder in which no other training runs, got {folder}, in use by process {holder}"
            ) from None
        except OSError as error:
            warnings.warn(f"{path}: no lock, so two trainings here would disturb each other ({error})", stacklevel=3)
        else:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode())
        _held.add(descriptor)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _forget_locks() -> None:
    """In a forked process, such as a data worker: it would hold the lock after the death of the training."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_locks)
