"""Files and folders that appear complete or not at all: after failures and kills, and beside other writers."""

import hashlib
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from dalle_fast.files import new_folder, sha256_of, write_atomically


class Stop(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["grün", "grün".encode(), lambda path: path.write_text("grün", encoding="utf-8")])
@pytest.mark.parametrize("durable", [True, False])
def test_text_bytes_and_writers(tmp_path: Path, content, durable: bool) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    for _ in range(2):
        write_atomically(path, content, durable=durable)
        assert path.read_bytes() == "grün".encode()
    assert names(path.parent) == ["a.txt"]


def test_a_failure_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def fails(partial: Path) -> None:
        partial.write_text("ne")
        assert path.read_text() == "old"
        raise Stop

    with pytest.raises(Stop):
        write_atomically(path, fails)
    assert (path.read_text(), names(tmp_path)) == ("old", ["a.txt"])
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(OSError):
        write_atomically(tmp_path / "folder", "new")
    assert names(tmp_path) == ["a.txt", "folder"]


def test_readers_see_whole_files_of_many_writers(tmp_path: Path) -> None:
    path, contents = tmp_path / "a", [bytes([i]) * 100_000 for i in range(4)]
    write_atomically(path, contents[0])

    def write(content: bytes) -> None:
        for _ in range(20):
            write_atomically(path, content, durable=False)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in contents
    assert path.read_bytes() in contents
    assert names(tmp_path) == ["a"]


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def dies(partial: Path) -> None:
        partial.write_text("ne")
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=write_atomically, args=(path, dies))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_text() == "old"
    (left,) = tmp_path.glob(".a.txt.*.partial")
    write_atomically(path, "new")
    assert (path.read_text(), names(tmp_path)) == ("new", [left.name, "a.txt"])


def test_what_is_durable_is_on_the_disk_before_and_after_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[Path, list[str]]] = []

    def fsync(handle: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{handle}")), [n for n in names(tmp_path) if n[0] != "."]))

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(tmp_path / "fast", "x", durable=False)
    assert synced == []
    write_atomically(tmp_path / "safe", "x")
    assert synced == [(synced[0][0], ["fast"]), (tmp_path, ["fast", "safe"])]
    assert synced[0][0].match(".safe.*.partial")
    synced.clear()
    with new_folder(tmp_path / "folder") as partial:
        (partial / "a").write_text("a")
    assert synced == [(partial / "a", ["fast", "safe"]), (partial, ["fast", "safe"]), (tmp_path, [*names(tmp_path)])]


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(Stop), new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("a")
        raise Stop
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == []
    with pytest.raises(OSError), new_folder(tmp_path / "out") as second, new_folder(tmp_path / "out") as first:
        (first / "a").write_text("first")
        (second / "a").write_text("second")
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "first"
    with (
        pytest.raises(ValueError, match="output folder: expected a new or empty one, got"),
        new_folder(tmp_path / "out"),
    ):
        raise AssertionError


def test_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()
