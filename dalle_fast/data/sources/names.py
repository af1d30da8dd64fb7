"""Names of sources: several shards in one name, by braces, globs and ``::``."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator

MAX_NAMES = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(name: str) -> list[str]:
    """The names that ``{00000..00099}`` (with leading zeros) and ``{a,b}`` stand for, in order; other braces stay.

    Raises:
        ValueError: there are more than MAX_NAMES.
    """
    names: dict[str, None] = {}
    for expanded in _expanded(name):
        names[expanded] = None
        if len(names) > MAX_NAMES:
            raise ValueError(f"source: expected a name of at most {MAX_NAMES:,} files, got {name}")
    return list(names)


def _expanded(name: str) -> Iterator[str]:
    for braces in _BRACES.finditer(name):
        if options := _options(braces[1]):
            for option in options:
                yield from _expanded(name[: braces.start()] + option + name[braces.end() :])
            return
    yield name


def _options(content: str) -> Iterator[str] | None:
    """The texts that braces with this content stand for; None if it is no range and no list."""
    if numbers := _RANGE.fullmatch(content):
        first, last = int(numbers[1]), int(numbers[2])
        padded = any(len(number) > 1 and number[0] == "0" for number in numbers.groups())
        width = max(map(len, numbers.groups())) if padded else 0
        return (f"{number:0{width}}" for number in range(first, last + 1))
    return iter(content.split(",")) if "," in content else None


def parts_of(source: str) -> list[str]:
    """The parts of a name that ``::`` joins; a name that exists is one part."""
    return [source] if os.path.exists(source) else [part for part in source.split("::") if part]


def names_several(source: str) -> bool:
    """True for a name of several files: with braces, a glob, or ``::``."""
    if os.path.exists(source):
        return False
    return "::" in source or glob.has_magic(source) or expand_braces(source) != [source]


def absolute_source(source: str) -> str:
    """The name of a source, which holds from any folder."""
    if names_several(source):
        return "::".join(map(os.path.abspath, parts_of(source)))
    return os.path.abspath(source) if os.path.exists(source) else source
