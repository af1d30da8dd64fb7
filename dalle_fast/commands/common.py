"""Arguments that commands share, and the opening of a source."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

if TYPE_CHECKING:
    from ..data import Pairs

Source = Annotated[str, arg(help="Source of pairs: a folder, .csv, .jsonl or .tar, or scenes, which are synthetic.")]
HeldOut = Annotated[str | None, arg(help="Source of held-out pairs.")]
System = Annotated[Path, arg(help="Folder of the system. A training that was stopped goes on from there.")]
Model = Annotated[str, arg(help="Folder that training wrote, or the name of a built-in model.")]
Preset = Annotated[
    Literal["tiny", "1.2B", "2.8B", "5.6B", "12B"], arg(help="Sizes and settings that the options below change.")
]


def open_source(source: str) -> Pairs:
    """Open a source; the samples it leaves out are reported on stderr."""
    from ..data import open_pairs

    pairs = open_pairs(source)
    report_skipped(source, pairs)
    return pairs


def report_skipped(source: str, pairs: Pairs) -> None:
    """Report the samples that a source left out on stderr."""
    if skipped := len(pairs.skipped):
        first = next(iter(pairs.skipped))
        print(f"{skipped} samples of {source} left out, the first: {first.name}: {first.reason}", file=sys.stderr)
