"""The public names have their types: what mypy says to a user's program."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dalle_fast as df

ROOT = Path(df.__file__).parent.parent
LAZY = ["dalle_fast", "dalle_fast.data", "dalle_fast.training"]

PROGRAM = """
from pathlib import Path

import torch

import dalle_fast as df
import dalle_fast.data
import dalle_fast.training
from dalle_fast.data import no_such_name  # error
from dalle_fast.training import TrainDVAE, no_such_name_either  # error

mask = df.AttentionMask("row", text_len=4, height=2, width=2)
q = torch.zeros(1, 1, mask.seq_len, 8)
reveal_type(df.sparse_attention)  # def (q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float | None =) -> Tensor
out: torch.Tensor = df.sparse_attention(q, q, q, mask)
df.sparse_attention(1, 2)  # error
df.sparse_attention(q, q, q, mask, scal=1.0)  # error
out = df.sample(q[0, 0], seed=0, top_k="many")  # error
y, kl = df.gumbel_softmax(q, 1.0, 0)
y, kl, codes = df.gumbel_softmax(q, 1.0, 0)  # error
reveal_type(df.reference.sparse_attention(q, q, q, mask))  # Tensor
reveal_type(df.backend().devices)  # tuple[str, ...]
reveal_type(df.TextToImage.load("tiny"))  # TextToImage
df.no_such_name  # error
mask.no_such_name  # error
df.AttentionMask("row", text_len="4", height=2, width=2)  # error

pairs: dalle_fast.data.Pairs = dalle_fast.data.open_pairs("scenes")
dalle_fast.data.open_pairs()  # error
dalle_fast.data.no_such_name  # error
dalle_fast.training.no_such_name  # error
dalle_fast.training.fit(1, 2, 3)  # error
TrainDVAE(steps="many")  # error
reveal_type(TrainDVAE().steps)  # int
"""  # noqa: E501


def mypy(program: str, folder: Path) -> dict[int, list[str]]:
    """The messages of mypy, by line; names of types without their modules."""
    pytest.importorskip("mypy")
    file = folder / "program.py"
    file.write_text(program)
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", file]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode in (0, 1), result.stdout + result.stderr
    messages: dict[int, list[str]] = {}
    for name, line, message in re.findall(r"^(.+?):(\d+): (.*)$", result.stdout, re.M):
        assert Path(name).name == file.name, result.stdout
        messages.setdefault(int(line), []).append(re.sub(r"\b(\w+\.)+(?=\w)", "", message))
    return messages


def test_a_users_program(tmp_path):
    """Good lines pass, bad ones are errors, and revealed types are those in the comments."""
    messages = mypy(PROGRAM, tmp_path)
    for number, line in enumerate(PROGRAM.splitlines(), 1):
        code, _, comment = line.partition("  # ")
        found = messages.get(number, [])
        if code.startswith("reveal_type"):
            assert found == [f'note: Revealed type is "{comment}"'], line
        elif comment == "error":
            assert any(message.startswith("error: ") for message in found), line
        else:
            assert not found, line


@pytest.mark.parametrize("package", LAZY)
def test_every_public_name_has_a_type(package, tmp_path):
    names = importlib.import_module(package).__all__
    assert mypy(f"import {package}\n" + "".join(f"{package}.{name}\n" for name in names), tmp_path) == {}


@pytest.mark.parametrize("package", LAZY)
def test_every_name_that_has_a_type_is_public(package):
    module = importlib.import_module(package)
    typed = [
        alias.name
        for node in ast.parse(Path(module.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for alias in statement.names
    ]
    assert sorted(typed) == sorted(module.__all__)
