"""Arguments that commands share, and opening a source of pairs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

if TYPE_CHECKING:
    from ..data import Pairs

Source = Annotated[str, arg(help="Source of pairs: a folder, a .csv, .jsonl or .tar file, or scenes (synthetic).")]
HeldOut = Annotated[str | None, arg(help="Source of held-out pairs.")]
System = Annotated[Path, arg(help="Folder of the system. An interrupted training resumes from there.")]
Model = Annotated[str, arg(help="Folder of a trained system, or the name of a built-in one.")]
Preset = Annotated[
    Literal["tiny", "1.2B", "2.8B", "5.6B", "12B"],
    arg(help="Default sizes and settings; other options override them."),
]


def open_source(source: str) -> Pairs:
    """The pairs of a source; reports on stderr what was left out."""
    from ..data import open_pairs

    pairs = open_pairs(source)
    report_skipped(source, pairs)
    return pairs


def report_skipped(source: str, pairs: Pairs) -> None:
    """Report on stderr what a source left out."""
    if skipped := len(pairs.skipped):
        first = next(iter(pairs.skipped))
        print(f"{skipped} samples of {source} left out, the first: {first.name}: {first.reason}", file=sys.stderr)
