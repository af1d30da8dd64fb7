"""The layers of the architecture, read from the import and include statements of every file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dalle_fast"
CSRC = ROOT / "csrc"

BINARIES = {"_C", "_host", "_build_info"}  # made by setup.py
LEAVES = {"_lazy", "captions", "config", "files", "mask", "minifloat"}
MODELS = {"ops", "sampling", *LEAVES}
TOOLS = {"data", "distributed", "figures", "models", "tokenizer", *MODELS}
# Each room of the package, from the bottom up, and the rooms that it may import: arrows only go down.
ROOMS: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "figures": {"files"},
    "tokenizer": {"_host", "captions", "files"},
    "reference": {"mask", "minifloat"},
    "ops": {"_C", "_build_info", "mask", "reference"},
    "sampling": {"config", "ops"},
    "models": MODELS,
    "data": {"_host", "_lazy", "captions", "files", "tokenizer"},
    "distributed": {"minifloat", "models"},
    "pipeline": {"config", "data", "distributed", "figures", "files", "models", "sampling", "tokenizer"},
    "training": TOOLS,
    "demo": {*TOOLS, "pipeline", "training"},
    "commands": {*TOOLS, "demo", "pipeline", "training"},
    "cli": {"commands", "config", "training"},  # the exceptions of training
    "__init__": {
        "_lazy",
        "config",
        "mask",
        "minifloat",
        "models",
        "ops",
        "pipeline",
        "reference",
        "tokenizer",
        "training",
    },
}
FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
FILES = {name.removesuffix(".__init__"): path for name, path in FILES.items() if path.stem != "_build_info"}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever the statement stands; parts after "dalle_fast."."""
    here = ["dalle_fast", *path.relative_to(PACKAGE).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            stem = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found |= {f"{stem}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    names = {name.removeprefix("dalle_fast.") for name in found if name.startswith("dalle_fast.")}
    return {_module_of(name) for name in names}


def _module_of(name: str) -> str:
    """The module of a dotted name: the name itself, or what stands in front of a class or a function."""
    return name if name in FILES or name in BINARIES else name.rpartition(".")[0] or name


def room_of(module: str) -> str:
    return module.partition(".")[0]


def test_arrows_only_go_down():
    """No room may import one that stands above it."""
    above = list(ROOMS)
    for place, (room, allowed) in enumerate(ROOMS.items()):
        assert allowed <= {*above[:place], *BINARIES}, room


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_what_its_room_may(name):
    room = room_of(name)
    assert room in ROOMS, f"{name}.py has no room: give it one in tests/test_imports.py and in the README"
    foreign = {room_of(other) for other in imported(FILES[name])} - {room}
    assert foreign <= ROOMS[room], f"{name} must not import {sorted(foreign - ROOMS[room])}"


def test_ops_reach_references_through_the_library_alone():
    assert [name for name in FILES if room_of(name) == "ops" and "reference" in imported(FILES[name])] == [
        "ops._library"
    ]


def test_no_circles():
    """Of modules, inside rooms as between them; a package's door imports its modules, not they the door."""
    graph = {name: imported(path) - BINARIES for name, path in FILES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"modules that import each other: {' -> '.join(error.args[1])}") from None


def test_the_reader_sees_imports():
    assert imported(FILES["ops.sparse_attention"]) >= {"mask", "ops._library"}
    assert imported(FILES["ops._library"]) >= {"_C", "reference"}
    assert imported(FILES["reference"]) == {"mask", "minifloat"}
    assert "pipeline" in imported(FILES["commands.images"])  # inside a function


@pytest.mark.parametrize("module", ["config", "data.filters", "training.settings", "cli"])
def test_settings_and_help_need_no_torch(module):
    code = f"import sys, dalle_fast.{module}; print(sorted({{'torch', 'numpy', 'matplotlib'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---------------------------------------------------------------------------------------------- csrc


def includes(path: Path) -> list[str]:
    return re.findall(r'^#include [<"]([^>"]+)[>"]', path.read_text(), re.M)


def backend_of(header: str) -> str | None:
    """ "cpu" or "cuda", of a file of csrc by its name; None of those that both use."""
    folder, _, name = header.rpartition("/")
    for backend in ("cpu", "cuda"):
        if folder == backend or name.startswith(f"{backend}_") or Path(name).stem.endswith(f"_{backend}"):
            return backend
    return None


CPP_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu"))


def test_backends_never_meet():
    for path in CPP_FILES:
        own = backend_of(path.relative_to(CSRC).as_posix())
        if own is not None:
            others = {backend_of(header) for header in includes(path)} - {own, None}
            assert not others, path.name


def test_kernels_have_the_suffix_of_their_backend():
    for path in CPP_FILES:
        if path.suffix == ".cu":
            assert path.stem.endswith("_cuda"), path.name


def test_common_headers_and_cuda_kernels_know_no_torch():
    """Geometry, noise and formats serve host and device; dispatch.h and checks.h are what the op files share."""
    for path in CPP_FILES:
        common = path.parent.name == "common" and path.name not in ("checks.h", "dispatch.h")
        if common or backend_of(path.relative_to(CSRC).as_posix()) == "cuda":
            assert not [header for header in includes(path) if "torch" in header or "Python" in header], path.name


def test_folders_of_ops_include_toolboxes_and_themselves():
    """What changes together lies together: no op reads another op's headers."""
    for path in CPP_FILES:
        folder = path.relative_to(CSRC).parts[0]
        if path.parent == CSRC:
            continue
        allowed = (
            {"common", "cpu", "cuda", folder} if folder not in ("common", "cpu", "cuda", "host") else {"common", folder}
        )
        own = [header for header in includes(path) if (CSRC / header).is_file()]
        assert {header.split("/")[0] for header in own} <= allowed, path.relative_to(CSRC)
