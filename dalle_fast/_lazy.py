"""Names of a package that are loaded when they are first used, so that importing it costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any


def attach(package: str, homes: Mapping[str, str]) -> None:
    """Give a package the public names of its modules, with ``__all__`` and ``dir()``; each is loaded at its first use.

    Type checkers see the package's imports under ``TYPE_CHECKING``, and no ``__getattr__`` that would accept any name.

    Args:
        package: its ``__name__``.
        homes: the module, below the package, of each public name; a module stands for itself.
    """

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f".{homes[name]}", package)
        value = module if name == homes[name] else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    vars(sys.modules[package]).update(__getattr__=load, __dir__=lambda: sorted(homes), __all__=list(homes))
