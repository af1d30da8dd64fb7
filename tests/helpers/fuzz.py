"""Seeded damage of files, for the tests in tests/fuzz. DALLE_FAST_FUZZ=1 tries more of it."""

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager

FULL = bool(int(os.environ.get("DALLE_FAST_FUZZ", "0")))
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def tries(quick: int = 150, full: int = 1000) -> range:
    return range(full if FULL else quick)


def overwritten(content: bytes, rng: random.Random, head: int = 0) -> bytes:
    """Some bytes or numbers changed; half of them among the first ``head`` bytes."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        end = min(head, len(damaged)) if head and rng.random() < 0.5 else len(damaged)
        place, kind = rng.randrange(end), rng.randrange(4)
        if kind == 0:
            damaged[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            damaged[place] = rng.randrange(256)
        elif kind == 2:
            damaged[place : place + 4] = rng.choice(NUMBERS).to_bytes(4, rng.choice(("little", "big")))
        else:
            damaged[place : place + 2] = (rng.choice(NUMBERS) & 0xFFFF).to_bytes(2, rng.choice(("little", "big")))
    return bytes(damaged[: len(content)])


def moved(content: bytes, rng: random.Random, other: bytes) -> bytes:
    """Cut off, with a part left out, twice, or from another file."""
    begin, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    part = content[begin:end]
    return (
        content[:begin],
        content[:begin] + content[end:],
        content[:end] + part + content[end:],
        content[:begin] + other[begin:],
        content[:begin] + rng.randbytes(end - begin) + content[end:],
        content[:begin] + bytes(end - begin) + content[end:],
    )[rng.randrange(6)]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise SystemExit(f"expected an end within {seconds} s")  # nobody catches it for an error of a file

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
