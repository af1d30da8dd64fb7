"""The index of a checkpoint, ``.metadata``, read without running anything that a stranger may have written into it.

``torch.distributed.checkpoint`` pickles the index, and a pickle may call any function. Here every class that a pickle
may name is listed, and stands for a record without methods. The index is then made anew from the checked records.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

METADATA_FILE = ".metadata"


class _Record:
    """An object of the pickle: its state, and no method of its class."""

    state: Any = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _kind(name: str) -> type[_Record]:
    return type(name, (_Record,), {})


_Index, _Tensor, _Properties, _Chunk = map(_kind, ("Metadata", "TensorStorageMetadata", "TensorProperties", "Chunk"))
_Key, _Place, _Ignored = map(_kind, ("MetadataIndex", "_StorageInfo", "Ignored"))
_OF_TORCH = "torch.distributed.checkpoint.metadata"
# All that a pickle may name. Tensors alone: for BytesStorageMetadata, torch would unpickle the bytes without a check.
_ADMITTED: dict[tuple[str, str], Any] = {
    (_OF_TORCH, "Metadata"): _Index,
    (_OF_TORCH, "TensorStorageMetadata"): _Tensor,
    (_OF_TORCH, "TensorProperties"): _Properties,
    (_OF_TORCH, "ChunkStorageMetadata"): _Chunk,
    (_OF_TORCH, "MetadataIndex"): _Key,
    (_OF_TORCH, "StorageMeta"): _Ignored,
    (_OF_TORCH, "_MEM_FORMAT_ENCODING"): int,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Place,
    ("torch.serialization", "_get_layout"): str,
    ("torch", "Size"): tuple,
    ("pathlib", "PosixPath"): _Ignored,  # where the checkpoint was written
    ("pathlib", "WindowsPath"): _Ignored,
    ("pathlib._local", "PosixPath"): _Ignored,  # of Python 3.13
    ("pathlib._local", "WindowsPath"): _Ignored,
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"expected the index of a checkpoint, got the class {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("expected the index of a checkpoint, got a persistent id")


def read_metadata(folder: Path) -> Metadata:
    """The index of a checkpoint: its tensors, and the file and the bytes of each.

    Raises:
        ValueError: a damaged one, or one that names a class that no index has; with the file and the class.
    """
    path = folder / METADATA_FILE
    try:
        with path.open("rb") as file:
            index = _fields(_Unpickler(file).load(), _Index)
        return Metadata(
            state_dict_metadata={_text(name): _tensor(found) for name, found in index["state_dict_metadata"].items()},
            storage_data={_key(key): _place(place) for key, place in index["storage_data"].items()},
            storage_meta=StorageMeta(),
        )
    except Exception as error:  # damaged pickles raise almost anything
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None


def files_of(metadata: Metadata) -> set[str]:
    """Names of the files that hold the tensors."""
    return {place.relative_path for place in metadata.storage_data.values()}


class MetadataReader(dcp.FileSystemReader):
    """Reads a checkpoint by the index as ``read_metadata`` reads it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))


def _fields(record: Any, kind: type[_Record]) -> dict[str, Any]:
    if type(record) is not kind or not isinstance(record.state, dict):
        raise ValueError(f"expected a record {kind.__name__}, got {type(record).__name__}")
    return record.state


def _tensor(record: Any) -> TensorStorageMetadata:
    fields = _fields(record, _Tensor)
    properties = fields["properties"]
    if type(properties) is not _Properties or not isinstance(properties.state[0], torch.dtype):
        raise ValueError("expected the dtype of a tensor")
    chunks = [_fields(chunk, _Chunk) for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        TensorProperties(dtype=properties.state[0]),
        _size(fields["size"]),
        [ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks],
    )


def _key(record: Any) -> MetadataIndex:
    fields = _fields(record, _Key)
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _text(fields["fqn"]),
        None if offset is None else _size(offset),
        None if index is None else _count(index),
    )


def _place(record: Any) -> _StorageInfo:
    fields = _fields(record, _Place)
    name = _text(fields["relative_path"])
    if Path(name).name != name or fields.keys() != {"relative_path", "offset", "length"}:
        raise ValueError(f"expected the name of a file in the folder and a range of its bytes, got {name!r}")
    return _StorageInfo(name, _count(fields["offset"]), _count(fields["length"]))


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"expected text, got {type(value).__name__}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"expected a number of 0 or more, got {value}")
    return value


def _size(value: Any) -> torch.Size:
    if type(value) is not tuple:
        raise ValueError(f"expected the size of a tensor, got {type(value).__name__}")
    return torch.Size([_count(length) for length in value])
