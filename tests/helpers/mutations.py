"""Seeded damage to files: bytes changed, cut, doubled and put elsewhere, and other values in JSON."""

from __future__ import annotations

import json
import random
from typing import Any

from helpers.fuzz import FULL

ROUNDS = 1_500 if FULL else 150  # per kind of file
_VALUES = (None, True, -1, 0, 1, 2**31, 2**70, -0.5, float("nan"), "", "x", "\0", "..", [], [[]], {}, {"a": 1}, [1] * 9)
_DEEP = (b"[" * 5_000, b'{"a":' * 5_000, b"9" * 5_000)
_WORDS = (b"\0", b"\xff", b'"', b"\n", b",", b"-1", b"null", b"\xed\xa0\x80", *_DEEP)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """The content with one to three changes to its bytes."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place, length = rng.randrange(len(changed) + 1), rng.choice((1, 2, 8, 64))
        match rng.randrange(6):
            case 0 if changed:
                changed[place % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                del changed[place : place + length]
            case 2:
                del changed[place:]
            case 3:
                changed[place:place] = rng.choice(_WORDS)
            case 4:
                changed[place:place] = changed[rng.randrange(len(changed) + 1) :][:length]
            case _:
                changed[place : place + length] = rng.randbytes(length)
    return bytes(changed)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """The JSON with another value, or none, somewhere in it."""
    root = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            walk(node[key])

    walk(root)
    node, key = rng.choice(places[: 60 if rng.random() < 0.7 else None])
    if rng.random() < 0.2:
        del node[key]
    elif isinstance(node[key], int) and rng.random() < 0.5:
        node[key] += rng.choice((-1, 1))
    else:
        node[key] = rng.choice(_VALUES)
    return json.dumps(root).encode()
