"""The samples of a tar shard: members that share their name up to its first dot (WebDataset naming).

A sample is an image and a ``.txt``, or a ``.json`` with ``caption``. ``a.jpg`` comes before ``a.seg.png``, ``a.txt``
before ``a.url.txt``: see ``_choose``. Dots in names (``photo.000.png``, ``photo.000.txt``) keep samples apart: see
``_split``. Every image and caption of a shard is in a sample that is used, or that is named with the reason.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

from ..images import MAX_FILE_SIZE, reason_of
from ..pairs import IMAGE_EXTENSIONS, Skipped, Unusable, captions_of, extension_of

BLOCK = tarfile.BLOCKSIZE
MAX_HEADERS = 1 << 20  # bytes of all headers of a member
_RECORD = re.compile(rb"(\d{1,9}) [^=]+=")  # of a PAX header: its length, key and value
_MAX_PADDING = 1 << 20  # bytes of zeros behind the last member; GNU tar writes 10 KB
_MAX_CAPTION = 1_000_000  # bytes of a caption's file


class Record(NamedTuple):
    """The place of a sample in its shard: sizes in bytes, everything else in blocks of 512."""

    image: int
    image_size: int
    caption: int
    caption_size: int
    header: int  # blocks from the start of the image's header, which holds the sample's name, to the image
    caption_is_json: int

    def captions_from(self, content: bytes) -> list[str]:
        """The captions: lines of a ``.txt``, or a text or list under ``caption`` in a ``.json``. Raises Unusable."""
        if not self.caption_is_json:
            return captions_of(content)
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise Unusable(f"the caption is not JSON: {error}") from None
        return captions_of(fields.get("caption") if isinstance(fields, dict) else None)


class Member(NamedTuple):
    """An image or a caption in a shard: offsets and sizes in bytes."""

    name: str
    kind: str  # "image", "txt", "json"
    offset: int  # of the header
    offset_data: int
    size: int

    @property
    def stem(self) -> str:
        """The name up to its last dot."""
        return self.name.rpartition(".")[0]


def find_samples(file: BinaryIO, shard: str) -> tuple[list[Record], list[Skipped]]:
    """The usable samples of an open shard in order, and those that are not.

    Args:
        shard: its name, for the reports.

    Raises:
        OSError: the file cannot be read.
    """
    skipped: list[Skipped] = []
    groups: dict[str, list[Member]] = {}
    names: set[str] = set()
    file_size = os.fstat(file.fileno()).st_size
    try:
        for info in members_of(file):
            key, kind = key_of(info.name), _kind_of(info.name)
            if not key or kind is None or info.isdir():
                continue
            if problem := "duplicate" if info.name in names else _problem_of(info):
                skipped.append(Skipped(f"{shard}:{info.name}", problem))
            else:
                member = Member(info.name, kind, info.offset, info.offset_data, info.size)
                groups.setdefault(key, []).append(member)
            names.add(info.name)
    except tarfile.TarError as error:
        skipped.append(Skipped(shard, str(error)))
    records = []
    for group, members in groups.items():
        for key, parts in _split(group, members).items():
            try:
                records.append(_record(file, file_size, *_choose(key, parts)))
            except Unusable as error:
                skipped.append(Skipped(f"{shard}:{key}", str(error)))
    return records, skipped


# ---------------------------------------------------------------------------------------------- members


class _Headers:
    """A tar file for tarfile, which believes what headers say: no read goes beyond the file or takes much memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self.left = MAX_HEADERS  # bytes that may still be read for this member
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        if size > BLOCK and size > self._size - self._file.tell():
            raise tarfile.ReadError(f"expected a header within the file, got one of {size} bytes")
        self.left -= max(size, 1)
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"expected headers of at most {MAX_HEADERS} bytes")
        content = self._file.read(size)
        if size > BLOCK:
            _check_content(content)
        return content

    def seek(self, offset: int) -> None:
        if not 0 <= offset <= self._size:
            raise tarfile.ReadError("unexpected end of data")
        self._file.seek(offset)


def _check_content(content: bytes) -> None:
    """Check that the content of a header is PAX records or a name, and padding: else it reaches into other members."""
    if re.search(rb"\d{1000}", content):  # tarfile takes quadratic time for them
        raise tarfile.ReadError("expected the records of a header, got 1000 digits in a row")
    end = 0
    while (match := _RECORD.match(content, end)) and int(match[1]):
        end += int(match[1])
    if content[end:].strip(b"\0") and content.partition(b"\0")[2].strip(b"\0"):
        raise tarfile.ReadError("expected a header of records or of a name, got one that holds other members")


def members_of(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file from where it stands.

    Raises:
        tarfile.ReadError: it is damaged, after the members ahead of the damage.
        OSError: it cannot be read.
    """
    file_size = os.fstat(file.fileno()).st_size
    if not file_size:
        raise tarfile.ReadError("the file is empty")
    offset = file.tell()
    try:
        headers = _Headers(file)
        with tarfile.open(fileobj=headers, mode="r:") as tar:  # type: ignore[call-overload]
            while member := tar.next():
                _check_header(tar, member, offset)
                yield member
                tar.members.clear()
                offset, headers.left = tar.offset, MAX_HEADERS
            offset = tar.offset
            file.seek(offset)
            if file.read(BLOCK) != bytes(BLOCK):  # tarfile takes a broken header for the end
                raise tarfile.ReadError("expected a header or the end mark")
            while content := file.read(1 << 16):
                if any(content) or file.tell() > offset + _MAX_PADDING:  # and a hole in the file
                    raise tarfile.ReadError("expected nothing behind the end mark")
    except OSError:
        raise
    except Exception as error:  # tarfile raises many kinds for damaged headers
        reason = str(error) if isinstance(error, tarfile.TarError) else reason_of(error)
        raise tarfile.ReadError(f"truncated or damaged at byte {min(offset, file_size)}: {reason}") from error


def _check_header(tar: tarfile.TarFile, member: tarfile.TarInfo, offset: int) -> None:
    """Check that a member's content lies between its headers, which begin at ``offset``, and the next member."""
    if member.size < 0 or tar.offset <= offset:
        raise tarfile.ReadError(f"expected a size of 0 or more, got {member.size} for {member.name}")
    if member.isreg() and not member.name:
        raise tarfile.ReadError("expected a name, got none")
    blocks = -(-member.size // BLOCK)
    if member.isreg() and not _is_sparse(member) and tar.offset != member.offset_data + blocks * BLOCK:
        raise tarfile.ReadError(f"expected one size for {member.name}, got several")


def _is_sparse(member: tarfile.TarInfo) -> bool:
    return member.issparse() or any(name.startswith("GNU.sparse.") for name in member.pax_headers)


def _problem_of(member: tarfile.TarInfo) -> str | None:
    if _is_sparse(member):
        return "a sparse file"
    return None if member.isreg() else "a link or device, not a file"


# ---------------------------------------------------------------------------------------------- names


def key_of(member: str) -> str:
    """The name of a member up to its first dot; "" for a hidden file."""
    folder, name = posixpath.split(member)
    stem = name.partition(".")[0]
    return posixpath.join(folder, stem) if stem else ""


def _kind_of(member: str) -> str | None:
    """The kind of a member by what is behind its last dot: "image", "txt", "json", or None."""
    name = posixpath.basename(member)
    extension = extension_of(name) if "." in name else ""
    kind = "image" if extension in IMAGE_EXTENSIONS else extension
    return kind if kind in ("image", "txt", "json") else None


def _split(key: str, members: Sequence[Member]) -> dict[str, Sequence[Member]]:
    """The samples of a group of members whose names begin with ``key`` and a dot.

    They are one, unless an image and a caption share a longer name (``photo.000.png``, ``photo.000.txt``), or longer
    names are all there is, and count (``photo.000.png``, ``photo.001.txt``): then each name up to its last dot is one.
    """
    images = {member.stem for member in members if member.kind == "image"}
    captions = {member.stem for member in members if member.kind != "image"}
    stems = images | captions
    counted = key not in stems and any(part.isdigit() for stem in stems for part in stem[len(key) :].split("."))
    if not (images & captions) - {key} and not counted:
        return {key: members}
    samples: dict[str, list[Member]] = {}
    for member in members:
        samples.setdefault(member.stem, []).append(member)
    return {**samples}


def _choose(key: str, members: Sequence[Member]) -> tuple[Member, Member]:
    """Image and caption of a sample. Raises Unusable.

    Each is the member that is named by the key and an extension or, where there is none, the only one with a longer
    name. A ``.txt`` comes before a ``.json``.
    """
    images = [member for member in members if member.kind == "image"]
    image = _best(key, images, "images")
    texts, fields = ([member for member in members if member.kind == kind] for kind in ("txt", "json"))
    exact = [[member for member in some if member.stem == key] for some in (texts, fields)]
    some = next((some for some in (*exact, texts, fields) if some), [])
    caption = _best(key, some, "captions")
    if image is None:
        raise Unusable("no image")
    if not image.size:
        raise Unusable("the image file is empty")
    if caption is None:
        raise Unusable("no caption")
    return image, caption


def _best(key: str, members: Iterable[Member], kind: str) -> Member | None:
    members = [member for member in members if member.stem == key] or list(members)
    if len(members) > 1:
        raise Unusable(f"{len(members)} {kind}: {', '.join(posixpath.basename(member.name) for member in members[:9])}")
    return members[0] if members else None


def _record(file: BinaryIO, file_size: int, image: Member, caption: Member) -> Record:
    """The record of a sample, whose caption is read. Raises Unusable."""
    if any(part.offset_data + part.size > file_size for part in (image, caption)):
        raise Unusable("truncated")
    record = Record(
        image.offset_data // BLOCK,
        image.size,
        caption.offset_data // BLOCK,
        caption.size,
        (image.offset_data - image.offset) // BLOCK,
        caption.kind == "json",
    )
    if max(record) >= 2**32 or record.header >= 2**16:
        raise Unusable("4 GiB or more, or beyond 2 TiB of the shard")
    for name, size, most in (("image", image.size, MAX_FILE_SIZE), ("caption", caption.size, _MAX_CAPTION)):
        if size > most:
            raise Unusable(f"expected at most {most:,} bytes for the {name}, got {size:,}")
    record.captions_from(os.pread(file.fileno(), caption.size, caption.offset_data))
    return record
