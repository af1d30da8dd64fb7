"""Index files of tar shards: built once, by any number of processes, killed or not; current, whole, or made anew."""

import json
import multiprocessing
import os
import pickle
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.tars import png, shard_of, write_tar

from dalle_fast.data import Batches, BrokenSample, Skipped, open_pairs
from dalle_fast.data.sources import tar as shards
from dalle_fast.data.sources import tar_index as index
from dalle_fast.data.sources.tar import ShardPairs

IN_BLOCK = 51  # records of a block of the index


def make_shards(folder: Path, count: int = 4) -> list[Path]:
    """Shards of 1, 2, 3, ... samples, numbered through."""
    return [shard_of(folder / f"{i:05d}.tar", i * (i + 1) // 2, samples=i + 1) for i in range(count)]


def numbers(pairs) -> list[tuple[int, str]]:
    return [(int(pair.image[0, 0, 0]), pair.caption) for pair in (pairs[i] for i in range(len(pairs)))]


def numbered(count: int) -> list[tuple[int, str]]:
    return [(i, f"number {i}") for i in range(count)]


def index_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / index.FOLDER).iterdir()}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Inodes and times of the index files, which change when a file is written anew."""
    files = (folder / index.FOLDER).glob("*.idx")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


# ---------------------------------------------------------------------------------------------- building


def test_numbers_run_through_the_shards(tmp_path: Path) -> None:
    make_shards(tmp_path)
    write_tar(tmp_path / "00001b.tar", {"x.png": png()})  # no sample in it
    pairs = open_pairs(tmp_path)
    assert numbers(pairs) == numbered(10)
    assert list(pairs.captions()) == [caption for _, caption in numbered(10)]
    assert list(pairs.skipped) == [("00001b.tar:x", "no caption")]
    for number in (-1, 10):
        with pytest.raises(IndexError, match=f"index: expected 0 to 9, got {number}"):
            pairs[number]


def test_parallel_equals_serial(tmp_path: Path) -> None:
    """Byte by byte."""
    for folder in (tmp_path / "serial", tmp_path / "parallel"):
        folder.mkdir()
        for shard in make_shards(folder):
            os.utime(shard, ns=(0, 1_000_000_007))
    serial = ShardPairs(sorted((tmp_path / "serial").glob("*.tar")), workers=1)
    parallel = ShardPairs(sorted((tmp_path / "parallel").glob("*.tar")), workers=3)
    assert numbers(parallel) == numbers(serial) == numbered(10)
    assert index_files(tmp_path / "parallel") == index_files(tmp_path / "serial")
    assert sorted(index_files(tmp_path / "serial")) == [f"{i:05d}.tar.idx" for i in range(4)]


def test_an_indexed_source_is_opened_without_its_shards(tmp_path: Path) -> None:
    paths = make_shards(tmp_path)
    write_tar(tmp_path / "00004.tar", {"x.png": png()})
    opened = open_pairs(tmp_path)
    for path in (*paths, tmp_path / "00004.tar"):
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))  # a trace of reading would be an error
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    before = identities(tmp_path)
    pairs = open_pairs(tmp_path)
    assert identities(tmp_path) == before
    assert len(pairs) == len(opened) == 10
    assert list(pairs.skipped) == list(opened.skipped) == [("00004.tar:x", "no caption")]
    with pytest.raises(BrokenSample, match=r"00000\.tar:byte 1536: UnidentifiedImageError"):
        pairs[0]


def test_a_killed_build_goes_on(tmp_path: Path) -> None:
    """Finished indexes stay; a half-written one is no index, and is removed later."""
    paths = make_shards(tmp_path)

    def build_and_die() -> None:
        replace = os.replace
        done = []

        def replace_twice(source: str, target: Path) -> None:
            if len(done) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(target)
            replace(source, target)

        os.replace = replace_twice
        ShardPairs(paths, workers=1)

    process = multiprocessing.get_context("fork").Process(target=build_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = identities(tmp_path)
    assert sorted(before) == ["00000.tar.idx", "00001.tar.idx"]
    (partial,) = (tmp_path / index.FOLDER).glob(".*.partial")

    assert numbers(ShardPairs(paths)) == numbered(10)
    after = identities(tmp_path)
    assert len(after) == 4
    assert before.items() <= after.items()
    assert partial.exists()  # somebody may still be writing it

    os.utime(partial, (0, time.time() - 2 * 3600))
    (tmp_path / index.FOLDER / "00003.tar.idx").unlink()
    assert numbers(ShardPairs(paths)) == numbered(10)
    assert not partial.exists()


def test_a_changed_shard_is_noticed(tmp_path: Path) -> None:
    """By those who open it, and by those who have it open."""
    first, second = shard_of(tmp_path / "a.tar", 0), shard_of(tmp_path / "b.tar", 3)
    pairs, before = open_pairs(tmp_path), identities(tmp_path)
    shard_of(second, 5)  # of the same size
    os.utime(second, ns=(0, 1_000_000_007))
    assert pairs[0].caption == "number 0"
    with pytest.raises(BrokenSample, match=rf"b\.tar: ValueError: {second} has changed since it was indexed"):
        pairs[3]
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        list(pairs.captions())
    assert list(open_pairs(tmp_path).captions()) == [f"number {i}" for i in (0, 1, 2, 5, 6, 7)]
    after = identities(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {"b.tar.idx"}

    first.unlink()
    with pytest.raises(BrokenSample, match=r"a\.tar: FileNotFoundError"):
        pickle.loads(pickle.dumps(pairs))[0]


def test_a_shard_that_changes_while_it_is_indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = shard_of(tmp_path / "a.tar", 0)
    open_tar = tarfile.open

    def touch_and_open(*args, **options):
        os.utime(shard, ns=(0, time.time_ns()))
        return open_tar(*args, **options)

    monkeypatch.setattr(tarfile, "open", touch_and_open)
    with pytest.raises(ValueError, match=f"shard {shard}: expected it to stay as it is while it is indexed"):
        ShardPairs([shard])


@pytest.mark.parametrize("damage", ["empty", "short", "long", "header", "magic", "other"])
def test_a_damaged_index_is_made_anew(tmp_path: Path, damage: str) -> None:
    make_shards(tmp_path)
    open_pairs(tmp_path)
    whole = index_files(tmp_path)
    path = tmp_path / index.FOLDER / "00002.tar.idx"
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "short": content[:-1],
            "long": content + b"\0",
            "header": content[:24] + bytes([content[24] ^ 1]) + content[25:],
            "magic": b"DFINDEX0" + content[8:],
            "other": b"something else " * 50,
        }[damage]
    )
    with pytest.warns(UserWarning, match=f"index {path}: expected a whole one of this version; it is made anew"):
        pairs = open_pairs(tmp_path)
    assert numbers(pairs) == numbered(10)
    assert index_files(tmp_path) == whole


def test_damage_behind_the_header_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    """Anywhere in the file; the other blocks can still be read."""
    shard = shard_of(tmp_path / "a.tar", 0, samples=2 * IN_BLOCK + 1)
    records = b"".join(index.RECORD.pack(i, 1, i, 1, 1, 0) for i in range(2 * IN_BLOCK + 1))
    index.write_index(str(shard), shard.stat(), records, [Skipped("a", "broken"), Skipped("b", "broken")])
    (path,) = (tmp_path / index.FOLDER).iterdir()
    whole, (found,) = path.read_bytes(), index.index_shards([shard])[0]
    parts = [52, 52 + 1024, 52 + 2048, 52 + 2048 + 24, len(whole)]  # blocks of 51, 51 and 1; skipped samples
    assert list(found.records()) == [(i, 1, i, 1, 1, 0) for i in range(len(records) // 20)]
    for place in (*range(parts[0], parts[-1], 50), *(end - 1 for end in parts[1:])):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        part = np.searchsorted(parts, place, side="right") - 1
        message = f"index: expected bytes {parts[part]} to {parts[part + 1]} of {path} as they were written, got others"
        pairs = open_pairs(shard)
        for block in range(3):
            number = block * IN_BLOCK
            if block == part:
                with pytest.raises(BrokenSample, match=rf"a\.tar: ValueError: {message}"):
                    pairs.find(number)
            else:
                assert pairs.find(number)[1].image == number
        with pytest.raises(ValueError, match=message):
            list(pairs.skipped if part == 3 else found.records())
    path.write_bytes(whole)
    assert list(open_pairs(shard).skipped) == [("a", "broken"), ("b", "broken")]


def test_indexes_go_where_they_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the shards or, where something is in the way, to the cache; if that cannot be either, it is an error."""
    cache, data = tmp_path / "cache", tmp_path / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    data.mkdir()
    make_shards(data)
    (data / index.FOLDER).write_text("in the way")
    for _ in range(2):
        assert numbers(open_pairs(data)) == numbered(10)
    assert len(list(cache.glob("dalle_fast/index/*/*.idx"))) == 4
    (data / index.FOLDER).unlink()
    assert numbers(open_pairs(data)) == numbered(10)  # those in the cache still hold
    assert not (data / index.FOLDER).exists()

    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(data / "00000.tar"))
    shard = shard_of(other / "a.tar", 0)
    (other / index.FOLDER).write_text("in the way")
    with pytest.raises(OSError, match=rf"index of {shard}: expected a place to write it, got .*File exists"):
        open_pairs(other)


def test_bad_workers(tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "a.tar", 0)
    with pytest.raises(ValueError, match="workers: expected 1 or more, got 0"):
        open_pairs(shard, workers=0)


# ---------------------------------------------------------------------------------------------- skipped samples


def test_skipped_samples_are_in_the_index(tmp_path: Path) -> None:
    make_shards(tmp_path)
    write_tar(tmp_path / "00002b.tar", {"1.png": png(), "2.txt": "x", "\udcff.png": png()})
    (tmp_path / "00003b.tar").write_bytes(b"not a tar file" * 100)
    for _ in range(2):
        pairs = open_pairs(tmp_path)
        assert numbers(pairs) == numbered(10)
        assert len(pairs.skipped) == 4
        assert Skipped("00002b.tar:2", "no image") in pairs.skipped
        assert Skipped("00002b.tar:2", "") not in pairs.skipped
        names = [name for name, _ in pairs.skipped]
        assert names == ["00002b.tar:1", "00002b.tar:2", "00002b.tar:\udcff", "00003b.tar"]
    batches = Batches(pairs, 2, lambda pair, rng: {"caption": pair.caption}, seed=0)
    batches.write_report(tmp_path / "skipped.jsonl")
    report = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["name"], line["count"]) for line in report] == [(name, 1) for name in names]


def test_a_shard_that_cannot_be_read_may_be_later(tmp_path: Path) -> None:
    make_shards(tmp_path)
    away = tmp_path / "away"
    (tmp_path / "00002b.tar").symlink_to(away)
    for _ in range(2):
        pairs = open_pairs(tmp_path)
        assert numbers(pairs) == numbered(10)
        ((name, reason),) = pairs.skipped
        assert name == "00002b.tar"
        assert "No such file" in reason
    shard_of(away, 100, samples=2)
    assert len(open_pairs(tmp_path)) == 12


def test_a_broken_sample_has_its_name(tmp_path: Path) -> None:
    name = "folder/" + "n" * 150  # longer than a plain header holds
    write_tar(tmp_path / "a.tar", {f"{name}.png": b"no image", f"{name}.txt": "a"})
    with pytest.raises(BrokenSample, match=rf"a\.tar:{name}: UnidentifiedImageError"):
        open_pairs(tmp_path)[0]


def test_an_image_that_is_too_large_is_skipped(tmp_path: Path) -> None:
    """An image of 4 GiB, of which nothing is on the disk."""
    image = tarfile.TarInfo("1.png")
    image.size = 2**32
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(image.tobuf())
        file.seek(image.size, os.SEEK_CUR)
        file.write(write_tar(tmp_path / "rest", {"1.txt": "one", "2.png": png(), "2.txt": "two"}).read_bytes())
    pairs = open_pairs(tmp_path)
    assert [pair[1] for pair in numbers(pairs)] == list(pairs.captions()) == ["two"]
    assert list(pairs.skipped) == [("a.tar:1", "4 GiB or more, or beyond 2 TiB of the shard")]


# ---------------------------------------------------------------------------------------------- open files


def open_files(folder: Path) -> list[str]:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.islink(link) and os.readlink(link).startswith(str(folder))]


def test_few_files_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_OPEN", 2)
    make_shards(tmp_path)
    pairs = open_pairs(tmp_path)
    assert open_files(tmp_path) == []
    for i in np.random.default_rng(0).permutation(10).tolist():
        assert pairs[i].caption == f"number {i}"
        assert len(open_files(tmp_path)) <= 4
    copy = pickle.loads(pickle.dumps(pairs))
    del pairs
    assert open_files(tmp_path) == []
    assert numbers(copy) == numbered(10)


def test_workers_read_shards(tmp_path: Path) -> None:
    """Each sample once an epoch, while the workers share the files that were open before them."""
    make_shards(tmp_path)
    pairs = open_pairs(tmp_path)
    assert numbers(pairs) == numbered(10)
    batches = Batches(pairs, 5, lambda pair, rng: {"caption": pair.caption}, seed=0, workers=2).iterate()
    epochs = [next(batches)["caption"] + next(batches)["caption"] for _ in range(3)]
    assert all(sorted(epoch) == sorted(caption for _, caption in numbered(10)) for epoch in epochs)
