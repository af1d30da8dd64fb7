"""The index of a checkpoint is read without running what a stranger has pickled into it."""

import io
import json
import os
import pickle
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from dalle_fast.training.checkpoint import CheckpointWriter, load_tensors, newest_checkpoint, saved_tensors
from dalle_fast.training.metadata import files_of, read_metadata

TENSORS = {
    "model/w": torch.arange(6.0).view(2, 3),
    "moments": torch.tensor([1, 65_535]).to(torch.uint16),
    "scalar": torch.tensor(1 / 3, dtype=torch.bfloat16),
    "float8": torch.ones(2).to(torch.float8_e4m3fn),
    "empty": torch.empty(0, dtype=torch.int64),
    "filters": torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two checkpoints."""
    with CheckpointWriter(tmp_path, 2) as writer:
        for step in (1, 2):
            writer.save(step, TENSORS, {"fingerprint": {}, "step": step})
    return tmp_path


def replace_index(checkpoint: Path, index: object) -> None:
    """Write another index, with the checksums that belong to it: a stranger can do that, too."""
    content = index if isinstance(index, bytes) else pickle.dumps(index)
    (checkpoint / ".metadata").write_bytes(content)
    forge(checkpoint, {".metadata": zlib.crc32(content)})


def forge(checkpoint: Path, files: dict[str, int]) -> None:
    values = json.loads((checkpoint / "run.json").read_text())
    del values["checksum"]
    values["files"] |= files
    values["checksum"] = zlib.crc32(json.dumps(values, sort_keys=True).encode())
    (checkpoint / "run.json").write_text(json.dumps(values))


def test_the_index_is_that_which_torch_reads(folder):
    checkpoint = folder / "step-00000002"
    ours, theirs = read_metadata(checkpoint), dcp.FileSystemReader(checkpoint).read_metadata()
    assert ours.storage_data == theirs.storage_data
    for name, tensor in theirs.state_dict_metadata.items():
        found = ours.state_dict_metadata[name]
        assert (found.size, found.chunks) == (tensor.size, tensor.chunks)
        assert found.properties.dtype == tensor.properties.dtype
    assert files_of(ours) == {"__0_0.distcp"}
    loaded = {name: torch.empty_like(t, device="cpu") for name, t in saved_tensors(checkpoint).items()}
    load_tensors(checkpoint, loaded)
    assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in TENSORS.items())


class Calls:
    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile(folder: Path) -> dict[str, tuple[object, str]]:
    """Pickles that do something, hidden in different places, and the class that must be named."""
    touch, ran = Calls(os.system, f"touch {folder}/ran"), f"open({str(folder / 'ran')!r}, 'w')"
    index = dcp.FileSystemReader(folder / "step-00000002").read_metadata()
    inside = Metadata(index.state_dict_metadata, None, {**index.storage_data, MetadataIndex("x"): touch})
    planned = Metadata(index.state_dict_metadata, {"x": Calls(eval, ran)}, index.storage_data)
    nested = pickle.dumps(Calls(pickle.loads, pickle.dumps(touch)))
    loads = Calls(torch.load, io.BytesIO(b""))
    as_bytes = Metadata({**index.state_dict_metadata, "model/w": BytesStorageMetadata()}, None, index.storage_data)
    return {
        "call": (touch, r"posix\.system"),
        "in the index": (inside, r"posix\.system"),
        "plan": (planned, r"builtins\.eval"),
        "nested": (nested, r"_pickle\.loads"),
        "torch": (loads, r"torch\.serialization\.load|_io\.BytesIO"),
        "dotted": (b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93.", r"torch\.os\.system"),
        "protocol 0": (f"cposix\nsystem\n(S'touch {folder}/ran'\ntR.".encode(), r"posix\.system"),
        "bytes": (as_bytes, r"BytesStorageMetadata"),
    }


CASES = ("call", "in the index", "plan", "nested", "torch", "dotted", "protocol 0", "bytes")


@pytest.mark.parametrize("case", CASES)
def test_a_pickle_that_does_something_does_nothing(case, folder):
    index, message = hostile(folder)[case]
    replace_index(folder / "step-00000002", index)
    with pytest.warns(UserWarning, match=rf"step-00000002: ignored, damaged is \.metadata .*{message}"):
        path, _ = newest_checkpoint(folder, {})
    assert path.name == "step-00000001"
    with pytest.raises(ValueError, match=r"step-00000002"):
        load_tensors(folder / "step-00000002", {"model/w": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"\.metadata"):
        saved_tensors(folder / "step-00000002")
    assert not (folder / "ran").exists()


def test_an_index_leads_to_no_file_outside_of_its_folder(folder):
    (folder / "outside").write_bytes((folder / "step-00000001" / "__0_0.distcp").read_bytes())
    for name in ("../outside", str(folder / "outside"), "run.json", ".."):
        index = dcp.FileSystemReader(folder / "step-00000002").read_metadata()
        for place in index.storage_data.values():
            place.relative_path = name
        replace_index(folder / "step-00000002", index)
        with pytest.warns(UserWarning, match="step-00000002: ignored, damaged is"):
            assert newest_checkpoint(folder, {})[0].name == "step-00000001"


@pytest.mark.parametrize("change", ["cut", "empty", "list", "types", "negative", "no tensors", "nested", "memo"])
def test_a_damaged_index_is_passed_over(change, folder):
    index = dcp.FileSystemReader(folder / "step-00000002").read_metadata()
    content: object = index
    if change == "cut":
        content = pickle.dumps(index)[:100]
    elif change == "empty":
        content = b""
    elif change == "list":
        content = [1, 2]
    elif change == "types":
        index.state_dict_metadata["model/w"].size = "2, 3"
    elif change == "negative":
        next(iter(index.storage_data.values())).offset = -5
    elif change == "no tensors":
        index.state_dict_metadata = None
    elif change == "nested":
        content = b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b"."
    elif change == "memo":
        content = b"\x80\x04Nr\xff\xff\xff\x00."
    replace_index(folder / "step-00000002", content)
    with pytest.warns(UserWarning, match=r"step-00000002: ignored, damaged is \.metadata"):
        assert newest_checkpoint(folder, {})[0].name == "step-00000001"


def test_tensors_are_read_without_their_classes(folder):
    checkpoint = folder / "step-00000002"
    content = io.BytesIO()
    torch.save(Calls(os.system, f"touch {folder}/ran"), content)
    length = len((checkpoint / "__0_0.distcp").read_bytes())
    (checkpoint / "__0_0.distcp").write_bytes(content.getvalue())
    index = dcp.FileSystemReader(checkpoint).read_metadata()
    for place in index.storage_data.values():
        place.offset, place.length = 0, min(length, len(content.getvalue()))
    replace_index(checkpoint, index)
    with pytest.raises(ValueError, match="step-00000002: expected this run's tensors, got"):
        load_tensors(checkpoint, {"model/w": torch.zeros(2, 3)})
    assert not (folder / "ran").exists()
