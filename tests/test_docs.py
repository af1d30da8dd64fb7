"""The documents: Python blocks run; commands, links and paths exist; every public name is explained."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import dalle_fast as df

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
API = ROOT / "docs" / "api.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def prose(page: Path) -> str:
    """A page without its fenced code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def short(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---------------------------------------------------------------------------------------------- code

PYTHON = [(page, i, block) for page in (README, API) for i, block in enumerate(blocks(page, "python"))]


@pytest.mark.parametrize("block", [p[2] for p in PYTHON], ids=[f"{short(page)}-{i}" for page, i, _ in PYTHON])
def test_python_blocks_run(block, tmp_path, monkeypatch):
    """And a shape in a comment is the shape: ``x.shape  # [2, 3]``."""
    monkeypatch.chdir(tmp_path)
    checked = re.sub(r"^(\S.*\.shape)  # (\[.*\])$", r"assert list(\1) == \2, \1", block, flags=re.M)
    exec(compile(checked, "block", "exec"), {"__name__": "block"})


COMMAND = re.compile(r"(?:dalle-fast|dalle_fast\.cli) ((?:train|data) [a-z]+|[a-z]+)(.*)")


def commands(page: Path) -> list[tuple[str, str]]:
    """Every command of a page, as its name and the rest of the line."""
    shell = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`([^`]+)`", prose(page).replace("\n", " "))
    return [found.groups() for line in [*shell, *spans] if "|" not in line and (found := COMMAND.search(line))]


@cache
def help_of(command: str) -> str:
    """What ``dalle-fast COMMAND --help`` prints."""
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit):
        import_module("dalle_fast.cli").main([*command.split(), "--help"])
    return out.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_commands_and_their_options_exist(page, cli):
    for command, arguments in commands(page):
        usage = help_of(command)
        assert f"dalle-fast {command}" in usage, command
        for option in re.findall(r"(?<!\S)--[a-z][a-z0-9.-]*", arguments):
            assert option in usage, f"{command} {option}"


# ---------------------------------------------------------------------------------------------- links and paths


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_links_and_images_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    for link in (link for link in links if "://" not in link):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_paths_in_the_text_exist(page):
    """Those from the root; one with a placeholder, such as ``<op>``, stands for many."""
    root = r"(?<![\w/.-])(?:benchmarks|csrc|dalle_fast|docs|tests)/"
    for path in re.findall(root + r"[\w/.-]*(?![\w<*])", page.read_text()):
        assert (ROOT / path.rstrip(".")).exists(), path


def test_the_tree_exists():
    """The tree of the README: names, two spaces or more, what they are for; indented names lie in the folder above."""
    tree = README.read_text().partition("## What is where")[2].split("```")[1].strip().splitlines()
    folder = ""
    for line in tree:
        names = re.split(r"\s{2,}", line.strip())[0].split()
        inside = line.startswith(" ")
        for name in (name for name in names if name.endswith(("/", ".py", ".cpp"))):
            assert (ROOT / (folder if inside else "") / name).exists(), line
        folder = folder if inside else names[0]


def test_readme_is_a_front_page():
    assert len(README.read_text().splitlines()) <= 150


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("module", ["dalle_fast", "dalle_fast.data", "dalle_fast.training"])
def test_every_public_name_is_explained(module):
    explained = set(re.findall(r"\w+", "".join(re.findall(r"^\| `.*$", API.read_text(), re.M))))
    assert set(import_module(module).__all__) <= explained


def test_every_name_in_the_text_exists():
    for page in PAGES:
        for name in re.findall(r"\bdf\.(\w+)", page.read_text()):
            assert hasattr(df, name), f"{short(page)}: df.{name}"
