"""Small tar shards for tests."""

import io
import tarfile
from pathlib import Path

from PIL import Image

RED, BLUE = (255, 0, 0), (0, 0, 255)


def png(colour=RED, size=(5, 4), mode="RGB", file_format="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, file_format, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, str | bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shard_of(path: Path, first: int, samples: int = 3) -> Path:
    """A shard of red images whose red and whose caption are their numbers."""
    members: dict[str, str | bytes] = {}
    for i in range(first, first + samples):
        members |= {f"{i}.txt": f"number {i}", f"{i}.png": png((i, 0, 0))}
    return write_tar(path, members)
