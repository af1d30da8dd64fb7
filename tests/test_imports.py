"""The layers of the architecture, read from the import statements: a package may import what its layer lists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dalle_fast"

# Each room of the package, and the rooms that it may import, from the bottom up.
LEAVES = {"config", "mask", "minifloat", "plots", "sheet"}  # sheet: pictures of pictures
MODELS = {"ops", *LEAVES}
TOOLS = {"models", "data", "tokenizer", *MODELS}
LAYERS = {
    **{leaf: set() for leaf in LEAVES},
    "reference": {"mask", "minifloat"},
    "tokenizer": {"_host", "config"},
    "data": {"tokenizer", "_host", "config"},
    "ops": {"mask", "_C", "_build_info"},
    "models": MODELS,
    "distributed": TOOLS,
    "training": {*TOOLS, "distributed"},
    "pipeline": {*TOOLS, "distributed", "training"},
    "commands": {*TOOLS, "distributed", "training", "pipeline", "demo"},
    "cli": {"commands", "config", "training"},  # the errors of training
}
# Each with its reason: the picture of a mask is its definition, and the fallback switch is where references run.
EXCEPTIONS = {("mask.py", "reference"), ("ops/_library.py", "reference")}


def imported_rooms(path: Path) -> set[str]:
    """First part, below dalle_fast, of every module that a file imports, wherever the statement is."""
    here = ["dalle_fast", *path.relative_to(PACKAGE).parent.parts]
    modules: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            modules += [".".join([*stem, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            modules += [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    return {module.split(".")[1] for module in modules if module.startswith("dalle_fast.")}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


PYTHON_FILES = sorted(path for path in PACKAGE.rglob("*.py") if room_of(path) in LAYERS)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_layer(path):
    room = room_of(path)
    name = path.relative_to(PACKAGE).as_posix()
    foreign = {other for other in imported_rooms(path) - {room} if (name, other) not in EXCEPTIONS}
    assert foreign <= LAYERS[room], f"{name} must not import {sorted(foreign - LAYERS[room])}"


def test_the_reader_sees_imports():
    assert imported_rooms(PACKAGE / "ops" / "attention.py") == {"mask", "ops"}
    assert imported_rooms(PACKAGE / "ops" / "_library.py") >= {"_C", "reference"}
    assert imported_rooms(PACKAGE / "reference.py") == {"mask", "minifloat"}


def test_config_needs_no_torch():
    assert "torch" not in re.findall(r"^(?:import|from) (\w+)", (PACKAGE / "config.py").read_text(), re.M)


def test_importing_the_package_is_cheap():
    code = "import sys, dalle_fast; print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def includes(path: Path) -> list[str]:
    return re.findall(r'^#include [<"]([^>"]+)[>"]', path.read_text(), re.M)


def test_backends_never_meet():
    for own, other in (("cpu", "cuda"), ("cuda", "cpu")):
        for path in (ROOT / "csrc" / own).glob("*"):
            assert not [header for header in includes(path) if other in header.split("/")], path.name


def test_geometry_noise_and_formats_know_no_torch():
    for path in (ROOT / "csrc").glob("*.h"):
        if path.name.endswith("_checks.h") or path.name == "backend.h":
            continue  # what the op files share
        assert not [header for header in includes(path) if "torch" in header or "Python" in header], path.name
    for path in (ROOT / "csrc" / "cuda").glob("*"):
        assert not [header for header in includes(path) if header.startswith("torch")], path.name
