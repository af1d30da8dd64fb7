"""Folders and tables of strangers: links, files that are no files, limits, quotes; named, never opened or invented."""

import csv
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.sources import captions, skipped, write
from helpers.tars import RED, png

from dalle_fast.data import BrokenSample, open_pairs
from dalle_fast.data.sources.files import COLUMNS


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path / "real", {"a.png": png(RED), "a.txt": "red", "sub/b.png": png(), "sub/b.txt": "blue"})
    write(tmp_path / "data", {"z.png": png(), "z.txt": "own"})
    links = {"part0": "../real", "part1": "../real/sub", "loop": ".", "up": "..", "gone": "nowhere"}
    for name, target in links.items():
        (tmp_path / "data" / name).symlink_to(target)
    (tmp_path / "real" / "back").symlink_to(tmp_path / "data")
    pairs = open_pairs(tmp_path / "data")
    assert captions(pairs) == ["own", "red", "blue"]
    assert [pairs.name(i) for i in range(3)] == ["z.png", "part0/a.png", "part0/sub/b.png"]
    assert skipped(pairs) == {"gone": "a link to nothing", "up": "a link to a folder that this one is in"}


def test_folders_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a.png": png(), "a.txt": "a", "deep/locked/b.png": png(), "deep/locked/b.txt": "b"})
    scandir = os.scandir

    def refuse(path: str) -> Iterator[os.DirEntry[str]]:
        if os.fspath(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    pairs = open_pairs(tmp_path)
    assert captions(pairs) == ["a"]
    assert skipped(pairs) == {"deep/locked": "the folder cannot be read: Permission denied"}


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    write(tmp_path, {"good.png": png(), "good.txt": "good", "fifo.png": png(), "zero.png": png(), "pipe.txt": "x"})
    os.mkfifo(tmp_path / "fifo.txt")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    rows = [{"image": name, "caption": "x"} for name in ("pipe.png", "/dev/zero", "good.png")]
    write(tmp_path, {"list.jsonl": "\n".join(map(json.dumps, rows))})
    pairs = open_pairs(tmp_path)
    assert captions(pairs) == ["good"]
    assert skipped(pairs) == dict.fromkeys(("fifo.png", "zero.png", "pipe.png"), "not a file")
    assert skipped(open_pairs(tmp_path / "list.jsonl")) == dict.fromkeys(("list.jsonl:1", "list.jsonl:2"), "not a file")
    (tmp_path / "good.png").unlink()
    os.mkfifo(tmp_path / "good.png")
    with pytest.raises(BrokenSample, match="not a file"):
        pairs[0]
    with pytest.raises(BrokenSample, match="not a file"):
        pairs.image_size(0)


def test_a_caption_file_beyond_the_limit_is_named(tmp_path: Path) -> None:
    files = {"a.png": png(), "a.txt": "x" * 1_000_001, "b.png": png(), "b.txt": "y" * 10_001, "c.png": png()}
    pairs = open_pairs(write(tmp_path, {**files, "c.txt": "z" * 10_000}))
    assert captions(pairs) == ["z" * 10_000]
    assert skipped(pairs) == {
        "a.png": "the caption file has more than 1,000,000 bytes",
        "b.png": "caption: expected at most 10,000 characters, got 10,001",
    }


def test_deep_json_is_a_bad_row(tmp_path: Path) -> None:
    lines = ["[" * 200_000, '{"image":' * 100_000, json.dumps({"image": "a.png", "caption": "a"})]
    pairs = open_pairs(write(tmp_path, {"a.png": png(), "d.jsonl": "\n".join(lines)}) / "d.jsonl")
    assert captions(pairs) == ["a"]
    assert [name for name, _ in pairs.skipped] == ["d.jsonl:1", "d.jsonl:2"]


def test_a_line_beyond_the_limit_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    row = json.dumps({"image": "a.png", "caption": "a"})
    lines = [row, json.dumps({"image": "a.png", "caption": row * 50_000}), row]
    pairs = open_pairs(write(tmp_path, {"a.png": png(), "d.jsonl": "\n".join(lines)}) / "d.jsonl")
    assert captions(pairs) == ["a", "a"]
    assert skipped(pairs) == {"d.jsonl:2": "not a row: more than 1,000,000 characters"}


@pytest.mark.parametrize("size", [300_000, 2_000_000])
def test_no_row_comes_out_of_a_caption(tmp_path: Path, size: int) -> None:
    inside = "x" * (size // 2) + "\na.png,INJECTED\n" + "y" * (size // 2)
    table = f'image,caption\na.png,first\na.png,"{inside}"\na.png,last\n'
    pairs = open_pairs(write(tmp_path, {"a.png": png(), "d.csv": table}) / "d.csv")
    assert captions(pairs) == (["first", "last"] if size < 1_000_000 else ["first"])
    assert len(skipped(pairs)) == 1
    assert csv.field_size_limit() == 131_072


@pytest.mark.parametrize(
    ("rows", "expected", "problem"),
    [
        ('a.png,"never closed\na.png,b\n', ["first"], ("d.csv:3", "a quote that is never closed")),
        ('a.png,"never closed\na.png,"b"\na.png,c\n', ["first"], ("d.csv:3", "',' expected after")),
        ('a.png,"red" box\na.png,c\n', ["first", "red box", "c"], None),
        ('\na.png,"two\nlines"\na.png\na.png,c,more\n', ["first", "two lines", "c"], ("d.csv:6", "no caption")),
    ],
)
def test_quotes(tmp_path: Path, rows: str, expected: list[str], problem: tuple[str, str] | None) -> None:
    write(tmp_path, {"a.png": png(), "d.csv": "image,caption\na.png,first\n" + rows})
    pairs = open_pairs(tmp_path / "d.csv")
    assert captions(pairs) == expected
    if problem:
        ((name, reason),) = pairs.skipped
        assert (name, problem[1] in reason) == (problem[0], True)


@pytest.mark.parametrize("columns", COLUMNS)
def test_names_of_columns(tmp_path: Path, columns: tuple[str, str]) -> None:
    image, caption = columns
    write(tmp_path, {"a.png": png(), "d.tsv": f'id\t{caption}\t{image}\n1\t"red, or so"\ta.png\n'})
    write(tmp_path, {"d.jsonl": json.dumps({image: "a.png", caption: ["red, or so", " ", "b"]})})
    assert captions(open_pairs(tmp_path / "d.tsv")) == captions(open_pairs(tmp_path / "d.jsonl")) == ["red, or so"]
    write(tmp_path, {"e.tsv": f"id,{caption},{image}\n"})
    with pytest.raises(ValueError, match=f"expected the columns .*file_name and text.*got .*{image}"):
        open_pairs(tmp_path / "e.tsv")
