"""The source distribution, and the checks before anything is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the source tree")


def setup(*args: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "--quiet", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment})


def test_the_sdist_has_every_file_that_is_compiled(tmp_path):
    made = setup("egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path), "--formats", "tar")
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("*.tar")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    kinds = (".h", ".cuh", ".cu", ".cpp", ".py", ".pyi", ".typed", ".safetensors", ".json")
    folders = ("csrc", "tests", "dalle_fast")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    wanted = {path.relative_to(ROOT).as_posix() for path in files if path.name != "_build_info.py"}
    assert {"pyproject.toml", "setup.py", "LICENSE", "README.md"} | wanted <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.parametrize("compiler", ["", "no-such-compiler -O2"])
def test_a_missing_compiler_is_one_line(compiler, tmp_path):
    made = setup(
        "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path), CXX=compiler, PATH=str(tmp_path)
    )
    assert made.returncode != 0
    name = compiler.partition(" ")[0] or "c++"
    expected = f"{name} is missing: install a C++ compiler (Debian, Ubuntu: apt-get install g++)"
    assert made.stderr.splitlines()[-1] == expected and "Traceback" not in made.stderr
