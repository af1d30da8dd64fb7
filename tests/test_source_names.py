"""Shards by braces and joined names, and several captions of an image."""

import json
import re
from pathlib import Path

import pytest
from helpers.sources import captions, write
from helpers.tars import RED, png, shard_of, write_tar

from dalle_fast.data import Batches, open_pairs
from dalle_fast.data.sources.view import Dropped, write_view


def test_lines_of_a_caption_file_are_captions_in_turn(tmp_path: Path) -> None:
    lines = ["a red box", "a box that is red", "red paint"]
    source = write(tmp_path / "in", {"a.png": png(RED), "a.txt": "\n".join([lines[0], "", *lines[1:], " "])})
    pairs = open_pairs(source)
    write_view(tmp_path / "view", source, pairs, [], {})
    for some in (pairs, open_pairs(tmp_path / "view")):
        assert list(some.captions()) == lines
        assert some[0].caption == some.caption(0) == lines[0]
        batches = Batches(some, 1, lambda pair, _: {"caption": pair.caption}, seed=0)
        stream = [batches.batch_at(step)["caption"][0] for step in range(6)]
        assert stream == lines * 2
        assert next(batches.iterate(4))["caption"] == [stream[4]]


def test_braces_and_joined_names(tmp_path: Path) -> None:
    for number in range(3):
        shard_of(tmp_path / f"{number:05}.tar", 3 * number)
    (tmp_path / "more").mkdir()
    shard_of(tmp_path / "more" / "x.tar", 9)
    for name, count in {
        "{00000..00002}.tar": 9,
        "{00000,00002}.tar": 6,
        "0000{1..2}.tar::more/{x,x}.tar": 9,
        "00001.tar::more": 6,
        "0000[01].tar::more/*.tar": 9,
    }.items():
        pairs = open_pairs("::".join(f"{tmp_path}/{part}" for part in name.split("::")))
        assert len(pairs) == count
    assert captions(open_pairs(f"{tmp_path}/{{00002,00000}}.tar")) == [f"number {i}" for i in (6, 7, 8, 0, 1, 2)]
    bad = {"{00000..00004}.tar": "00003", "00000.tar::gone.tar": "gone", "{a..b}.tar::00000.tar": "{a..b}"}
    for name, missing in bad.items():
        with pytest.raises(ValueError, match=f"got none by .*{re.escape(missing)}.tar"):
            open_pairs("::".join(f"{tmp_path}/{part}" for part in name.split("::")))
    with pytest.raises(ValueError, match="at most 1,000,000 files"):
        open_pairs("{0..9999999999}.tar")


def test_views_of_braces_open_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        shard_of(tmp_path / f"{number}.tar", 3 * number)
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("{0..1}.tar", "0.tar::1.tar")):
        write_view(tmp_path / f"view{number}", name, open_pairs(name), [Dropped(0, "first", {})], {})
        with monkeypatch.context() as elsewhere:
            elsewhere.chdir(tmp_path / f"view{number}")
            assert len(open_pairs(tmp_path / f"view{number}")) == 5


def test_shards_further_down_are_named(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shard_of(tmp_path / "one" / "00000.tar", 0)
    with pytest.raises(ValueError, match=r"00000\.tar: a tar shard among folders; open such shards by .*/\*\*/\*\.tar"):
        open_pairs(tmp_path)
    (tmp_path / "UPPER.TAR").write_bytes((tmp_path / "one" / "00000.tar").read_bytes())
    assert len(open_pairs(tmp_path)) == 3


def test_captions_of_shards_take_turns(tmp_path: Path) -> None:
    members = {"0.png": png(), "0.txt": "a red box\r\n\r\na box\n", "1.png": png()}
    members["1.json"] = json.dumps({"caption": ["one", "", "two &amp; two", "three"]})
    pairs = open_pairs(write_tar(tmp_path / "a.tar", members))
    assert list(pairs.captions()) == ["a red box", "a box", "one", "two & two", "three"]
    assert captions(pairs) == [pairs.caption(i) for i in range(2)] == ["a red box", "one"]
    batches = Batches(pairs, 2, lambda pair, _: {"caption": pair.caption}, seed=0)
    epochs = [set(batches.batch_at(step)["caption"]) for step in range(4)]
    assert epochs == [{"a red box", "one"}, {"a box", "two & two"}, {"a red box", "three"}, {"a box", "one"}]
