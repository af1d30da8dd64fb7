"""The samples of a tar shard: which members belong together, and headers of any value."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers.tars import png, shard_of
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_fast.data import Skipped, open_pairs
from dalle_fast.data.sources.tar_samples import find_samples

RED, GREEN, BLUE = png((255, 0, 0)), png((0, 255, 0)), png((0, 0, 255))
BLOCK = 512


def tar_of(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    """A tar of members in order, whose names may occur again."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def found(path: Path) -> tuple[list[tuple[str, int]], list[Skipped]]:
    """Captions of the usable samples and the strongest colour of their images, and the skipped ones."""
    pairs = open_pairs(path.parent if path.is_file() and not path.name.startswith("a.") else path)
    samples = [pairs[i] for i in range(len(pairs))]
    return [(pair.caption, int(pair.image[0, 0].argmax())) for pair in samples], list(pairs.skipped)


# ---------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("extra", ["a.seg.png", "a.depth.png", "a.left.jpg", "a.url.txt", "a.exif.json", "b/a.png"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("caption", ["a.txt", "a.json", "a.TXT"])
def test_files_beside_an_image_do_not_replace_it(tmp_path: Path, extra: str, first: bool, caption: str) -> None:
    text = json.dumps({"caption": "a red square"}) if caption == "a.json" else "a red square"
    members = [("a.jpg", RED), (caption, text)]
    other = (extra, "http://example.org" if extra == "a.url.txt" else GREEN)
    members.insert(0 if first else 2, other)
    kept, skipped = found(tar_of(tmp_path / "a.tar", members))
    assert kept == [("a red square", 0)]
    assert skipped == ([("a.tar:b/a", "no caption")] if extra == "b/a.png" else [])


def test_longer_names_where_there_are_no_others(tmp_path: Path) -> None:
    members = [("x.input.jpg", RED), ("x.outputs.txt", "red"), ("y.png", BLUE), ("y.meta.json", '{"caption": "blue"}')]
    assert found(tar_of(tmp_path / "a.tar", members)) == ([("red", 0), ("blue", 2)], [])


@pytest.mark.parametrize("caption", ["txt", "json"])
def test_dots_in_names_lose_nothing(tmp_path: Path, caption: str) -> None:
    members = []
    for i in range(6):
        text = f"number {i}" if caption == "txt" else json.dumps({"caption": f"number {i}"})
        members += [(f"v1.0/photo.{i:03}.png", png((i, 0, 0))), (f"v1.0/photo.{i:03}.{caption}", text)]
    pairs = open_pairs(tar_of(tmp_path / "a.tar", members))
    assert [(int(pair.image[0, 0, 0]), pair.caption) for pair in map(pairs.__getitem__, range(6))] == [
        (i, f"number {i}") for i in range(6)
    ]
    assert [pairs.name(i) for i in range(6)] == [f"a.tar:v1.0/photo.{i:03}" for i in range(6)]
    assert list(pairs.skipped) == []


@pytest.mark.parametrize(
    ("members", "kept", "skipped"),
    [
        ("p.0.png p.0.txt p.1.png", ["p.0.txt"], ["p.1"]),
        ("p.0.png p.0.txt p.1.txt", ["p.0.txt"], ["p.1"]),
        ("p.0.png p.1.txt", [], ["p.0", "p.1"]),
        ("p.png p.0.png p.0.txt", ["p.0.txt"], ["p"]),
        ("p.txt p.0.png p.0.txt", ["p.0.txt"], ["p"]),
        ("p.png p.txt p.0.png p.0.txt", ["p.txt", "p.0.txt"], []),
        ("d.left.png d.right.png d.txt", [], ["d"]),
        ("d.png d.a.txt d.b.txt", [], ["d"]),
        ("b.png b.jpg b.txt", [], ["b"]),
        ("b.png b.txt b.TXT", [], ["b"]),
        ("b.png b.txt b.json", ["b.txt"], []),
        (".png .txt dir/.a.png c.png c.txt", ["c.txt"], []),
        ("photo..png photo..txt", ["photo..txt"], []),
        ("png txt a.png a.txt", ["a.txt"], []),
    ],
)
def test_which_members_belong_together(tmp_path: Path, members: str, kept: list[str], skipped: list[str]) -> None:
    content = {"png": RED, "jpg": RED}
    path = tar_of(tmp_path / "a.tar", [(name, content.get(name.rpartition(".")[2], name)) for name in members.split()])
    with path.open("rb") as file:
        records, problems = find_samples(file, "a.tar")
        captions = [os.pread(file.fileno(), record.caption_size, record.caption * BLOCK).decode() for record in records]
    assert captions == kept
    assert [name for name, _ in problems] == [f"a.tar:{key}" for key in skipped]


def test_repeated_names_are_named(tmp_path: Path) -> None:
    members = [("a.png", RED), ("a.txt", "first"), ("a.png", GREEN), ("a.txt", "second"), ("a.txt", "third")]
    members += [("b.png", RED), ("b.jpg", RED), ("b.txt", "b")]
    kept, skipped = found(tar_of(tmp_path / "a.tar", members))
    assert kept == [("first", 0)]
    assert skipped == [
        ("a.tar:a.png", "duplicate"),
        ("a.tar:a.txt", "duplicate"),
        ("a.tar:a.txt", "duplicate"),
        ("a.tar:b", "2 images: b.png, b.jpg"),
    ]


PART = st.sampled_from(["a", "b", "0", "1", "seg"])
NAMES = st.tuples(st.lists(PART, min_size=1, max_size=3).map(".".join), st.sampled_from(["png", "jpg", "txt", "json"]))


@settings(max_examples=250)
@given(st.lists(NAMES.map(".".join), min_size=1, max_size=9))
def test_every_member_is_accounted_for(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    """Its sample is used, with nothing of another's, or is named."""
    path = tmp_path_factory.getbasetemp() / "any.tar"
    text = {name: json.dumps({"caption": name}) if name.endswith("json") else name for name in names}
    tar_of(path, [(name, text[name]) for name in names])
    with path.open("rb") as file:
        records, skipped = find_samples(file, "s")
        read = [
            (os.pread(file.fileno(), r.image_size, r.image * BLOCK).decode(), *r.captions_from(
                os.pread(file.fileno(), r.caption_size, r.caption * BLOCK))) for r in records
        ]  # fmt: skip
    problems = [name.removeprefix("s:") for name, _ in skipped]
    assert [reason for _, reason in skipped].count("duplicate") == len(names) - len(set(names))
    assert len({image for image, _ in read}) == len({caption for _, caption in read}) == len(read)
    used = {name for pair in read for name in pair}
    keys = {name.partition(".")[0] for name in used} | {name.rpartition(".")[0] for name in used}
    for name in names:
        own = {name.partition(".")[0], name.rpartition(".")[0]}
        assert name in used or own & keys or own & set(problems), (name, read, problems)
    for image, caption in read:
        image_stem, caption_stem = image.rpartition(".")[0], caption.rpartition(".")[0]
        key = image.partition(".")[0]
        assert key == caption.partition(".")[0]
        if image_stem != caption_stem:  # neither has a partner of its own
            assert not {f"{image_stem}.{kind}" for kind in ("txt", "json")} & set(names)
            assert not (caption_stem != key and {f"{caption_stem}.{kind}" for kind in ("png", "jpg")} & set(names))


# ---------------------------------------------------------------------------------------------- headers


def header(name: str, size: int | bytes = 0, kind: bytes = b"0", content: bytes = b"") -> bytes:
    """A header with a right checksum, and the blocks of its content."""
    info = tarfile.TarInfo(name)
    info.size, info.type = 0 if isinstance(size, bytes) else max(size, 0), kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if isinstance(size, bytes):
        block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + content + bytes(-len(content) % BLOCK)


def pax(record: bytes, kind: bytes = b"x") -> bytes:
    return header("pax", len(record), kind, record)


def record(key: str, value: str) -> bytes:
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return f"{length} {key}={value}\n".encode()


FILE = header("b.png", len(RED), content=RED)
BASE_256 = {n: n.to_bytes(12, "big", signed=True) for n in (-1, -512, -1024, -1536, -(2**40))}
POSITIVE = {n: b"\x80" + n.to_bytes(11, "big") for n in (2**40, 2**63, 2**80)}
HEADERS = {
    **{f"size {n}": header("b.png", field) for n, field in {**BASE_256, **POSITIVE}.items()},
    **{f"PAX header of {n}": header("pax", field, b"x") for n, field in {**BASE_256, **POSITIVE}.items()},
    **{f"global header of {n}": header("pax", field, b"g") for n, field in {**BASE_256, **POSITIVE}.items()},
    **{f"long name of {n}": header("long", field, b"L") for n, field in {**BASE_256, **POSITIVE}.items()},
    **{f"PAX size={n}": pax(record("size", n)) + FILE for n in ("-5000", "-512", "-1", "9" * 30, "7", "9" * 5000)},
    "global size": pax(record("size", "7"), b"g") + FILE,
    "length of a record": pax(b"99999999999999999999 a=b\n") + FILE,
    "length 0": pax(b"0 a=b\n") + FILE,
    "a million digits": pax(b"1" * 1_000_000) + FILE,
    "2 MB of headers": pax(b"x" * 2_000_000) + FILE,
    "headers without end": pax(b"") * 3000 + FILE,
    "names without end": header("long", 0, b"L") * 3000 + FILE,
    "no encoding": pax(record("hdrcharset", "\udcff".encode(errors="surrogateescape").decode("latin"))) + FILE,
    "sparse map": pax(record("GNU.sparse.map", "a,b")) + FILE,
    "sparse size": pax(record("GNU.sparse.size", "zz")) + FILE,
    "sparse 1.0 cut": pax(record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0")) + header("b.png", 0),
    "octal": header("b.png", b"99999999999\0"),
}  # fmt: skip


def test_an_end_of_zeros(tmp_path: Path) -> None:
    """As much as tar writes is padding; a megabyte is a download that did not end."""
    content = shard_of(tmp_path / "a.tar", 0).read_bytes()
    for zeros, named in ((0, []), (50_000, []), (2_000_000, ["a.tar"])):
        (tmp_path / "a.tar").write_bytes(content + bytes(zeros))
        pairs = open_pairs(tmp_path / "a.tar")
        assert (len(pairs), [name for name, _ in pairs.skipped]) == (3, named)


@pytest.mark.parametrize("blocks", [1, 2, 20])
def test_a_hole_is_not_the_end(tmp_path: Path, blocks: int) -> None:
    """Zeros where a header should be are the end mark to tarfile; members behind them are not lost without a word."""
    head, tail = (shard_of(tmp_path / "part", i, 1).read_bytes()[: 4 * BLOCK] for i in (0, 1))
    (tmp_path / "a.tar").write_bytes(head + bytes(blocks * BLOCK) + tail + bytes(2 * BLOCK))
    pairs = open_pairs(tmp_path / "a.tar")
    assert len(pairs) == 1
    assert list(pairs.skipped) == [("a.tar", "truncated or damaged at byte 2048: expected nothing behind the end mark")]


INDEX = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from dalle_fast.data import open_pairs
for path in sys.argv[1:]:
    pairs = open_pairs(path, workers=1)
    print(len(pairs), [list(sample) for sample in pairs.skipped])
print(next(int(line.split()[1]) for line in open("/proc/self/status") if "VmHWM" in line))
"""


def test_headers_of_any_value(tmp_path: Path) -> None:
    """In little time and memory, each is the end of its shard, which is named; other shards and samples are read."""
    folders = []
    for i, (name, damage) in enumerate(HEADERS.items()):
        folder = tmp_path / f"{i:02} {name[:20]}"
        folder.mkdir()
        good = header("a.png", len(RED), content=RED) + header("a.txt", 3, content=b"red")
        (folder / "1.tar").write_bytes(good + damage + header("c.png", len(RED), content=RED) + bytes(2 * BLOCK))
        shard_of(folder / "2.tar", 0)
        folders.append(str(folder))
    run = subprocess.run([sys.executable, "-c", INDEX, *folders], capture_output=True, text=True, timeout=120)
    *lines, peak = run.stdout.splitlines()
    assert len(lines) == len(folders), run.stderr[-2000:]
    for name, line in zip(HEADERS, lines, strict=True):
        assert line.startswith("4 [['1.tar"), (name, line)
        assert " at 0x" not in line
    assert int(peak) < 400_000  # kB


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_shard_does_not_end_the_others(tmp_path: Path, workers: int) -> None:
    for i, name in enumerate(["length of a record", "PAX header of 1099511627776", "sparse map", "PAX size=-5000"]):
        (tmp_path / f"bad{i}.tar").write_bytes(HEADERS[name])
    shard_of(tmp_path / "good.tar", 0)
    pairs = open_pairs(tmp_path, workers)
    assert len(pairs) == 3
    assert {name for name, _ in pairs.skipped} == {f"bad{i}.tar" for i in range(4)}


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    """Made by GNU tar where it is there; else by hand. The next member's bytes are not read as theirs."""
    sparse = bytearray(header("a.txt", 512, b"S"))
    sparse[386:410] = b"%011o\0%011o\0" % (8192, 512)
    sparse[483:495] = b"%011o\0" % 8704
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    secret = header("secret.txt", 512, content=b"SECRET" * 85)
    content = header("a.png", len(RED), content=RED) + bytes(sparse) + b"x" * 512 + secret
    (tmp_path / "a.tar").write_bytes(
        content + header("z.png", len(RED), content=RED) + header("z.txt", 1, content=b"z") + bytes(1024)
    )
    kept, skipped = found(tmp_path / "a.tar")
    assert kept == [("z", 0)]
    assert ("a.tar:a.txt", "a sparse file") in skipped
    assert {name for name, _ in skipped} == {"a.tar:a.txt", "a.tar:a", "a.tar:secret"}


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_sparse_members_of_gnu_tar(tmp_path: Path, version: str) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"a caption")
    (tmp_path / "a.png").write_bytes(RED)
    for name in ("b.png", "b.txt"):
        (tmp_path / name).write_bytes(RED if name == "b.png" else b"b")
    command = [
        "tar",
        "--format=posix",
        "-S",
        f"--sparse-version={version}",
        "-cf",
        "a.tar",
        "a.txt",
        "a.png",
        "b.png",
        "b.txt",
    ]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("needs GNU tar")
    kept, skipped = found(tmp_path / "a.tar")
    assert kept == [("b", 0)]
    assert ("a.tar:a.txt", "a sparse file") in skipped


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_and_long_names(tmp_path: Path, tar_format: int) -> None:
    key = "/".join(["folder"] * 12) + "/" + "n" * 60 + ("ü" * 90 if tar_format != tarfile.USTAR_FORMAT else "")
    with tarfile.open(tmp_path / "a.tar", "w", format=tar_format, pax_headers={"comment": "x" * 9999}) as tar:
        for name, content in ((f"{key}.png", RED), (f"{key}.txt", b"red")):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5 if tar_format == tarfile.PAX_FORMAT else 1
            tar.addfile(info, io.BytesIO(content))
    pairs = open_pairs(tmp_path / "a.tar")
    assert (pairs[0].caption, pairs.name(0), list(pairs.skipped)) == ("red", f"a.tar:{key}", [])


@pytest.mark.parametrize("kind", [b"x", b"g", b"L"])
def test_a_header_does_not_swallow_members(tmp_path: Path, kind: bytes) -> None:
    """Else the name that it holds would be given to a later member."""
    content = b"other.png\0" if kind == b"L" else record("path", "other.png")
    swallowed = content + bytes(-len(content) % BLOCK) + header("b.png", len(RED), content=RED)
    good = header("a.png", len(RED), content=RED) + header("a.txt", 3, content=b"red")
    damaged = good + header("long", len(swallowed), kind, swallowed) + header("c.png", len(BLUE), content=BLUE)
    (tmp_path / "a.tar").write_bytes(damaged + header("other.txt", 1, content=b"x") + bytes(2 * BLOCK))
    kept, skipped = found(tmp_path / "a.tar")
    assert kept == [("red", 0)]
    assert [name for name, _ in skipped] == ["a.tar"]
    assert skipped[0].reason.endswith("got one that holds other members")


@pytest.mark.parametrize("value", ["\0\1\0" * 400, "x" * 505, "1 a=b\n" * 200])
def test_values_of_records_hold_anything(tmp_path: Path, value: str) -> None:
    content = record("SCHILY.xattr.user.x", value) + record("path", "n" * 600 + ".png") + record("a", "b" * 900)
    members = pax(content) + header("short.png", len(RED), content=RED) + pax(record("path", "n" * 600 + ".txt"))
    (tmp_path / "a.tar").write_bytes(members + header("short.txt", 3, content=b"red") + bytes(2 * BLOCK))
    assert found(tmp_path / "a.tar") == ([("red", 0)], [])


def test_links_are_named(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", [("a.png", RED), ("a.txt", "red")])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name, kind in (("b.png", tarfile.LNKTYPE), ("c.txt", tarfile.SYMTYPE), ("d.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            tar.addfile(info)
    kept, skipped = found(tmp_path / "a.tar")
    assert kept == [("red", 0)]
    assert skipped == [(f"a.tar:{name}", "a link or device, not a file") for name in ("b.png", "c.txt", "d.png")]


# ---------------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    "content", ["[" * 200_000, '{"a":' * 100_000, "1" * 5000, '{"caption": NaN}', "\0", b"\xff\xfe"]
)
def test_json_of_strangers(tmp_path: Path, content: str | bytes) -> None:
    kept, skipped = found(
        tar_of(tmp_path / "a.tar", [("a.png", RED), ("a.json", content), ("b.png", BLUE), ("b.txt", "b")])
    )
    assert kept == [("b", 2)]
    ((name, reason),) = skipped
    assert name == "a.tar:a"
    assert reason == "no caption" or reason.startswith("the caption is not JSON: ")


def test_a_huge_caption_takes_no_memory(tmp_path: Path) -> None:
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(header("a.png", len(RED), content=RED))
        file.write(header("a.txt", 2**32 + 512))
        file.seek(2**32 + 512, os.SEEK_CUR)
        file.write(header("b.png", len(RED), content=RED) + header("b.txt", 1, content=b"b") + bytes(2 * BLOCK))
    assert found(tmp_path / "a.tar")[1][0].name == "a.tar:a"
