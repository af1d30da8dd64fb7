"""Damaged tar shards: their whole samples are read, the rest is named, in little time."""

import io
import random
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from helpers.fuzz import moved, overwritten, time_limit, tries
from helpers.tars import png

from dalle_fast.data import BrokenSample, open_pairs
from dalle_fast.data.sources.tar_samples import BLOCK, find_samples

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


class Member(NamedTuple):
    name: str
    begin: int  # of its headers
    data: int
    end: int


def shard(tar_format: int) -> tuple[bytes, dict[int, Member]]:
    """A shard of six samples, two of them with long names, and its members by the places of their contents."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for i in range(6):
            key = f"{i}" if i < 4 else "/".join(["folder"] * 20) + f"/{i}" + "x" * (0 if tar_format == 0 else 90)
            for name, content in (
                (f"{key}.png", png((i, 0, 0))),
                (f"{key}.txt", f"number {i} {'x' * 100 * i}".encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(content), 1.5 if tar_format == tarfile.PAX_FORMAT else 1
                tar.addfile(info, io.BytesIO(content))
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        members = [Member(info.name, info.offset, info.offset_data, info.offset_data + info.size) for info in tar]
    return buffer.getvalue(), {member.data: member for member in members}


def with_checksums(content: bytes, members: dict[int, Member]) -> bytes:
    """A shard whose headers' checksums fit what they say."""
    fixed = bytearray(content)
    for member in members.values():
        for begin in {member.begin, member.data - BLOCK}:
            header = fixed[begin : begin + BLOCK]
            if len(header) == BLOCK:
                header[148:156] = b" " * 8
                fixed[begin + 148 : begin + 156] = b"%06o\0 " % sum(header)
    return bytes(fixed)


def damage(content: bytes, members: dict[int, Member], other: bytes, rng: random.Random) -> tuple[bytes, bool, bool]:
    """A damaged shard, and whether its contents are where they were, and checksums show the damage of headers."""
    if rng.random() < 0.2:
        return moved(content, rng, other), False, False
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5))):
        member = rng.choice(list(members.values()))
        begin = rng.choice((member.begin, member.begin, member.data - BLOCK, member.data))
        field = rng.choice(((0, 100), (124, 12), (156, 1), (257, 8), (345, 155), (0, 512)))
        part = slice(begin + field[0], begin + sum(field))
        damaged[part] = overwritten(bytes(damaged[part]), rng)
    damaged = damaged[: len(content)]
    shown = rng.random() < 0.3
    return bytes(damaged) if shown else with_checksums(damaged, members), True, shown


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_shards(tmp_path: Path, name: str) -> None:
    content, members = shard(FORMATS[name])
    other, _ = shard(FORMATS["gnu" if name == "pax" else "pax"])
    path = tmp_path / "a.tar"
    kept = 0
    for seed in tries():
        rng = random.Random(f"{name} {seed}")
        damaged, in_place, shown = damage(content, members, other, rng)
        path.write_bytes(damaged)
        with time_limit(5), path.open("rb") as file:
            records, skipped = find_samples(file, "a.tar")
        assert all(sample.name.startswith("a.tar") and sample.reason for sample in skipped), seed
        assert len(records) >= 6 or skipped or not shown, seed
        kept += len(records)
        for record in records:
            places = record.image * BLOCK, record.caption * BLOCK
            sizes = record.image_size, record.caption_size
            assert all(place + size <= len(damaged) for place, size in zip(places, sizes, strict=True)), seed
            if not in_place:
                continue
            image, caption = (members[place] for place in places)  # never from the middle of another
            whole = [damaged[part.begin : part.end] == content[part.begin : part.end] for part in (image, caption)]
            for part, size, same in zip((image, caption), sizes, whole, strict=True):
                assert not same or size == part.end - part.data, seed
            if all(whole):
                assert image.name.removesuffix(".png") == caption.name.removesuffix(".txt"), seed
        if seed % 25 == 0:
            check_all(path, seed)
    assert kept > len(tries())  # else nothing was tried


def check_all(path: Path, seed: int) -> None:
    """Read the shard as a source. Its index is made anew each time."""
    try:
        with time_limit(10):
            pairs = open_pairs(path, workers=1)
    except ValueError as error:
        assert "expected image-caption pairs, got none" in str(error), seed
        return
    for i in range(len(pairs)):
        assert pairs.name(i).startswith("a.tar:"), seed
        try:
            pair = pairs[i]
        except BrokenSample as error:
            assert " at 0x" not in error.reason, seed
        else:
            assert pair.image.dtype == np.uint8 and pair.caption, seed
