"""Checkpoints: everything a run needs to go on bit by bit as if it had never stopped.

A checkpoint is a folder such as ``step-00001000``: the tensors as ``torch.distributed.checkpoint`` writes them, and
``run.json`` with all else, the checksums of the files and its own. A thread writes it under a name that ends in
``.tmp`` while training goes on, and renames it once all of it is on the disk. So a folder ``step-...`` is complete,
whenever the computer stopped.

Each of many processes writes, and later reads, its shards of the tensors. Their number may change in between.

To read a checkpoint runs nothing that it holds: see ``metadata.py``; tensors are read with ``weights_only``.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..distributed.sharding import local, sharded_like
from ..distributed.world import ALONE, World
from ..files import crc_of, sync, write_atomically
from .metadata import METADATA_FILE, MetadataReader, files_of, read_metadata

RUN_FILE = "run.json"  # written last
UNFINISHED = ".tmp"  # suffix of a folder that is being written or deleted
DIVERGED = ".diverged"  # suffix of a checkpoint from which a training diverged
# Keys of a fingerprint that one of two runs may lack: old checkpoints have neither.
CORPUS, TRAINED_WITH = "corpus", "trained with "  # the latter in front of the name of a part
Tensors = Mapping[str, torch.Tensor]

warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process needs no process group


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every global random number generator, for JSON."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - other code may draw from it
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state(device).tolist() if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what ``random_state`` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), device)


def check_random_state(state: Any, device: torch.device) -> None:
    """Raise an exception unless ``set_random_state`` can restore this state."""
    _, _, place, has_gauss, gauss = state["numpy"]
    if type(place) is not int or not 0 <= place <= 624 or has_gauss not in (0, 1) or type(gauss) is not float:
        raise ValueError("numpy: expected a state of its generator")  # numpy does not check these
    before = random_state(device)
    try:
        set_random_state(state, device)
    finally:
        set_random_state(before, device)


# ---------------------------------------------------------------------------------------------- write


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time, while the run goes on.

    Args:
        folder: of the checkpoints; made if it does not exist.
        keep: number of the newest that are kept; the others are deleted.
        world: the processes of the run. All must make the same calls.
    """

    def __init__(self, folder: Path, keep: int, world: World = ALONE) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.keep, self.world = folder, keep, world
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(self, step: int, tensors: Tensors, values: Mapping[str, Any], keep_all: bool = False) -> None:
        """Copy the state and start to write it. Waits for the previous checkpoint, and raises its error if it failed.

        Args:
            step: finished steps.
            tensors: may change as soon as this returns. Unsharded ones are the same in all processes.
            values: all else that the run needs, for JSON.
            keep_all: delete no other checkpoint.
        """
        self.wait()
        copies = {
            name: sharded_like(local(tensor.detach()).to("cpu", copy=True), tensor, self.world)
            for name, tensor in tensors.items()
        }
        self._writing = self._thread.submit(self._write, step, copies, json.dumps(values), keep_all)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk; raises its error if it failed."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def clear(self) -> None:
        """Delete every checkpoint."""
        for path in _newest_first(self.folder):
            _delete(path)

    def set_aside(self, step: int) -> None:
        """Rename the checkpoints from a step on, so that no run resumes them; only the newest of them is kept."""
        self.wait()
        for path in reversed(_newest_first(self.folder)):
            if _step_of(path) >= step:
                for earlier in self.folder.glob(f"*{DIVERGED}"):
                    shutil.rmtree(earlier)
                path.rename(path.with_name(path.name + DIVERGED))
        sync(self.folder)

    def _write(self, step: int, tensors: dict[str, torch.Tensor], values: str, keep_all: bool) -> None:
        if self.world.is_first:  # the others write only after the first has made its plan
            for path in self.folder.glob(f"*{UNFINISHED}"):
                shutil.rmtree(path)
        path = self.folder / f"step-{step:08}"
        unfinished = path.with_name(path.name + UNFINISHED)
        group, alone = self.world.checkpoints, self.world.size == 1
        try:
            dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(unfinished), process_group=group, no_dist=alone)
        except dcp.CheckpointException as error:  # a BaseException, which `except Exception` misses
            raise OSError(f"checkpoint {path}: expected to write it, got {_first_failure(error)}") from error
        if not self.world.is_first:
            return
        run = {"files": {file.name: crc_of(file) for file in unfinished.iterdir()}, **json.loads(values)}
        write_atomically(unfinished / RUN_FILE, json.dumps({"checksum": _checksum_of_values(run), **run}))
        if path.exists():
            _delete(path)  # damaged: otherwise this run would have gone on from it
        unfinished.rename(path)
        sync(self.folder)
        complete = _newest_first(self.folder)
        kept = complete[complete.index(path) :][: self.keep]  # checkpoints of later steps are damaged, too
        for other in complete:
            if other not in kept and not keep_all:
                _delete(other)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()


def _newest_first(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, newest first."""
    complete = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(complete, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name[5:])


def _delete(path: Path) -> None:
    """Delete a folder, renaming it first, so that a half-deleted one has no valid name."""
    doomed = path.with_name(f"{path.name}.old{UNFINISHED}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _checksum_of_values(values: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def _first_failure(error: dcp.CheckpointException) -> BaseException:
    return next(iter(error.failures.values()))[0]


# ---------------------------------------------------------------------------------------------- read


def newest_checkpoint(
    folder: Path, fingerprint: Mapping[str, Any], check: Callable[[int, dict[str, Any]], None] | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """The newest intact checkpoint in a folder and its values; None without any checkpoint.

    Incomplete and damaged ones are skipped with a warning that names them.

    Args:
        fingerprint: expected value of ``values["fingerprint"]``. The corpus, and the parts of the system that the model
            is trained with, may be missing in either.
        check: raises ValueError for values that are none of a run after so many steps: they count as damaged.

    Raises:
        ValueError: it is of another model or of other data, and the message names the differences; or all checkpoints
            are damaged.
    """
    for path in sorted(folder.glob(f"*{UNFINISHED}")):
        warnings.warn(f"checkpoint {path}: ignored, it is incomplete", stacklevel=2)
    complete = _newest_first(folder)
    for path in complete:
        try:
            values, damaged = _read_run(path, check)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            damaged = [f"{RUN_FILE} ({type(error).__name__}: {error})"]
        if not damaged:
            try:
                strange = files_of(read_metadata(path)) - values["files"].keys()
                damaged = [f"{METADATA_FILE} (it names {', '.join(sorted(strange))})"] if strange else []
            except ValueError as error:
                damaged = [f"{METADATA_FILE} ({error})"]
        if damaged:
            warnings.warn(f"checkpoint {path}: ignored, damaged is {', '.join(damaged)}", stacklevel=2)
            continue
        found = values["fingerprint"]
        optional = {name for name in fingerprint.keys() ^ found.keys() if name.startswith((CORPUS, TRAINED_WITH))}
        compared = (fingerprint.keys() | found.keys()) - optional
        differing = sorted(name for name in compared if fingerprint.get(name) != found.get(name))
        if differing:
            wanted, got = (", ".join(f"{k}={run.get(k)}" for k in differing) for run in (fingerprint, found))
            raise ValueError(
                f"checkpoint {path}: expected {wanted}, got {got}; choose another folder or resume nothing"
            )
        return path, values
    if complete:
        raise ValueError(f"checkpoints: expected an intact one in {folder}, got {len(complete)}, all damaged")
    return None


def _read_run(path: Path, check: Callable[[int, dict[str, Any]], None] | None) -> tuple[dict[str, Any], list[str]]:
    """The values of a checkpoint, and the names of its damaged files; raises an exception if the values are damaged."""
    values = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
    if "checksum" in values and values.pop("checksum") != _checksum_of_values(values):  # old ones have none
        raise ValueError("expected the values of its checksum, got others")
    files, fingerprint = values["files"], values["fingerprint"]
    if not isinstance(fingerprint, dict):
        raise ValueError(f"fingerprint: expected a dict, got {type(fingerprint).__name__}")
    if METADATA_FILE not in files or any(Path(name).name != name for name in files):
        raise ValueError(f"files: expected names of files in the folder, {METADATA_FILE} among them, got {list(files)}")
    if check:
        check(_step_of(path), values)
    return values, [name for name, checksum in files.items() if crc_of(path / name) != checksum]


def saved_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Shapes and dtypes of the tensors in a checkpoint, as tensors on the device "meta"."""
    return {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype, device="meta")
        for name, tensor in read_metadata(path).state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }


def load_tensors(path: Path, tensors: Tensors) -> None:
    """Fill tensors, on any device, with those of the same names in a checkpoint.

    Raises:
        ValueError: one of them is missing, or has another shape.
    """
    try:
        dcp.load(dict(tensors), storage_reader=MetadataReader(path), no_dist=True)
    except dcp.CheckpointException as error:
        raise ValueError(f"checkpoint {path}: expected this run's tensors, got {_first_failure(error)}") from error
