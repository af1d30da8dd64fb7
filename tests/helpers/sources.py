"""Folders of files for tests of sources, and their contents."""

from __future__ import annotations

from pathlib import Path

from dalle_fast.data import Pairs


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def captions(pairs: Pairs) -> list[str]:
    return [pairs[i].caption for i in range(len(pairs))]


def skipped(pairs: Pairs) -> dict[str, str]:
    return dict(pairs.skipped)
