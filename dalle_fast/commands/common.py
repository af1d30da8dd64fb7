"""What commands share: arguments, and how a source is opened."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

if TYPE_CHECKING:
    from ..data import Pairs

Source = Annotated[str, arg(help="Source of pairs: a folder, .csv, .jsonl or .tar, or scenes, which are drawn.")]
HeldOut = Annotated[str | None, arg(help="Source of held-out pairs.")]
System = Annotated[Path, arg(help="Folder of the system. A training that was stopped goes on from there.")]
Model = Annotated[str, arg(help="Folder that training wrote, or the name of a built-in model.")]
Preset = Annotated[
    Literal["tiny", "1.2B", "2.8B", "5.6B", "12B"], arg(help="Sizes and settings that the options below change.")
]


def open_source(source: str) -> Pairs:
    """The pairs of a source; says on stderr what it left out."""
    from ..data import open_pairs

    pairs = open_pairs(source)
    report(f"samples of {source}", [f"{name}: {reason}" for name, reason in pairs.skipped])
    return pairs


def report(what: str, names: Sequence[object]) -> None:
    """Say on stderr what was left out."""
    if names:
        print(f"{len(names)} {what} left out, the first: {names[0]}", file=sys.stderr)
