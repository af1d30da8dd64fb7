"""The command line: ``dalle-fast --help``. Finds the requested command, and turns errors into one line."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

import dalle_fast

from .commands.about import info, plan, plot
from .commands.data import dedup, emoji, encode, filter_, index
from .commands.images import demo, generate, reconstruct
from .commands.train import training_commands
from .config import PRESETS
from .training import TrainingDiverged, TrainingStopped

SIGPIPE = 13
DESCRIPTION = "DALL-E (2021): train it, and generate images from captions."


def _parse(args: Sequence[str]) -> None:
    """Find the command that the arguments name, and run it."""
    top: dict[str, Any] = {"demo": demo, "generate": generate, "reconstruct": reconstruct, "encode": encode}
    top |= {"plot": plot, "plan": plan, "info": info}
    groups: dict[str, tuple[str, dict[str, Any]]] = {
        "data": ("Build and clean datasets.", {"emoji": emoji, "index": index, "filter": filter_, "dedup": dedup}),
        "train": ("Train one of the four parts of a system.", training_commands(_preset(args))),
    }
    every = top | {f"{group} {name}": f for group, (_, commands) in groups.items() for name, f in commands.items()}
    for words in (1, 2):
        name = " ".join(args[:words])
        if name in every:
            tyro.cli(every[name], prog=f"dalle-fast {name}", args=args[words:])
            return
    # Help, or an unknown command: tyro prints the right message.
    nested = (Annotated[_union(commands), subcommand(name, description=d)] for name, (d, commands) in groups.items())
    tyro.cli(reduce(or_, nested, _union(top)), prog="dalle-fast", description=DESCRIPTION, args=args)


def _union(commands: dict[str, Any]) -> Any:
    """One type for tyro: any of these subcommands."""
    return reduce(or_, (Annotated[Any, subcommand(name, constructor=f)] for name, f in commands.items()))


def _preset(args: Sequence[str]) -> str:
    """The preset that the arguments name; needed before they are parsed, because it decides the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?")
    name = parser.parse_known_args(args)[0].preset
    return name if name in PRESETS else "tiny"  # an unknown one is an error of the command that takes it


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0, 2 for bad input, 128 + the signal for a training that was stopped.

    With ``DALLE_FAST_TRACEBACK=1`` an error that no command expects is not turned into a line, to see where it is from.
    """
    args = sys.argv[1:] if args is None else args
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a terminal that cannot show a caption or a name
    try:
        try:
            if [*args] == ["--version"]:
                print(f"dalle-fast {dalle_fast.__version__}")
            else:
                _parse(args)
        finally:
            sys.stdout.flush()  # a reader that has gone away is noticed here
    except TrainingStopped as stopped:
        print(f"dalle-fast: {stopped}; run the same command again to resume", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _close_stdout()
        return 128 + SIGPIPE
    except (ValueError, OSError, ImportError, TrainingDiverged) as error:
        return _fail(str(error))
    except MemoryError as error:
        return _fail(f"out of memory {error}")
    except Exception as error:
        if os.environ.get("DALLE_FAST_TRACEBACK") == "1":
            raise
        return _fail(f"{type(error).__name__}: {error} (DALLE_FAST_TRACEBACK=1 shows where)")
    return 0


def _fail(message: str) -> int:
    print(f"dalle-fast: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _close_stdout() -> None:
    """Have Python not complain at its end that what is left cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
