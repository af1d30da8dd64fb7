"""Long work on the images of a source, in shards that a killed run need not do again, by one process or by several.

A folder of ``settings.json``, which says what the work is, and ``shard-00000/``, ``shard-00001/``, ...: what was made
of pairs 0 to ``shard_size - 1``, and so on. Each appears complete or not at all; its ``skipped.jsonl`` names the pairs
that could not be read. Shard i is the work of process i modulo their number, and depends on no other shard.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..files import new_folder, write_atomically
from .batches import collate
from .pairs import BrokenSample, Pairs, Skipped

SETTINGS, SKIPPED = "settings.json", "skipped.jsonl"
Prepare = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the result; all of it must be the same when the work goes on."""

    fingerprint: str  # which model
    source: str  # which pairs
    pairs: int
    image_size: int
    shard_size: int


class Shard(NamedTuple):
    """What was made of a stretch of pairs, without the broken ones."""

    rows: np.ndarray  # int64 [n], which pairs
    values: np.ndarray  # [n, k, ...], of the k images that were made of each
    captions: list[str]


def shard_folder(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}"


def process_in_shards(
    folder: str | Path,
    pairs: Pairs,
    settings: Settings,
    prepare: Prepare,
    process: Callable[[torch.Tensor], torch.Tensor],
    save: Callable[[Path, Shard], None],
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> bool:
    """Do this process's part of the work, or what is left of it.

    Args:
        folder: a new one, or that of the same work.
        prepare: ``(image, index) -> uint8 [k, S, S, 3]``; what to make of the image of a pair.
        process: float images [k * B, 3, S, S] in [0, 1] to values [k * B, ...].
        save: writes a shard to a folder.
        batch_size: pairs processed together.
        workers: processes that read and prepare images ahead; 0 does it in this one.
        rank: which of ``ranks`` processes this is.

    Returns:
        whether all shards are done; others may still be at work.

    Raises:
        ValueError: the folder holds something else, or work with other settings.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
    folder = Path(folder)
    _settle(folder, settings)
    size, total = settings.shard_size, settings.pairs
    shards = range(-(-total // size))
    todo = [number for number in shards[rank::ranks] if not shard_folder(folder, number).is_dir()]
    names = {shard_folder(folder, number).name for number in todo}
    for partial in folder.glob(".*.partial"):  # of a run that was killed
        if partial.name.split(".")[1] in names:
            shutil.rmtree(partial)

    def stretches(number: int) -> list[range]:
        rows = range(number * size, min((number + 1) * size, total))
        return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]

    loader = DataLoader(
        _Prepared(pairs, prepare),
        batch_size=None,
        sampler=(stretch for number in todo for stretch in stretches(number)),
        num_workers=workers,
        generator=torch.Generator(),  # else the loader would draw from torch's global one
    )
    prepared = iter(loader)
    for number in tqdm(todo, unit="shard", desc=folder.name, disable=None):  # None: on a tty only
        skipped: list[Skipped] = []
        shard = _process((next(prepared) for _ in stretches(number)), process, skipped)
        with new_folder(shard_folder(folder, number)) as partial:
            save(partial, shard)
            write_skipped(partial / SKIPPED, skipped)
    return all(shard_folder(folder, number).is_dir() for number in shards)


def _settle(folder: Path, settings: Settings) -> None:
    """Begin a folder, or see that it was begun for the same work."""
    path = folder / SETTINGS
    wanted = json.loads(json.dumps(asdict(settings)))  # tuples become lists, as they are read back
    if path.is_file():
        try:
            found = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"output folder: expected settings in {path}, got {error}") from None
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(f"{name}: expected {found.get(name)}, with which {folder} was begun, got {value}")
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"output folder: expected a new or empty one, or one to go on with, got {folder}")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(wanted, indent=2) + "\n")


def _process(prepared: Iterable[Any], process: Callable[[torch.Tensor], torch.Tensor], skipped: list[Skipped]) -> Shard:
    rows: list[int] = []
    values: list[np.ndarray] = []
    captions: list[str] = []
    for some_rows, images, some_captions, some_skipped in prepared:
        if some_rows:
            draws = len(images) // len(some_rows)
            made = process(collate([{"image": image} for image in images.numpy()])["image"]).cpu().numpy()
            values.append(made.reshape(len(some_rows), draws, *made.shape[1:]))
        rows += some_rows
        captions += some_captions
        skipped += some_skipped
    return Shard(np.array(rows, np.int64), np.concatenate(values) if values else np.empty(0), captions)


class _Prepared(Dataset[tuple[list[int], np.ndarray, list[str], list[Skipped]]]):
    """Stretches of pairs, as DataLoader workers read them: rows, images [k * rows, S, S, 3], captions, broken ones."""

    def __init__(self, pairs: Pairs, prepare: Prepare) -> None:
        self._pairs = pairs
        self._prepare = prepare

    def __getitem__(self, stretch: range) -> tuple[list[int], np.ndarray, list[str], list[Skipped]]:
        rows: list[int] = []
        images: list[np.ndarray] = []
        captions: list[str] = []
        skipped: list[Skipped] = []
        for index in stretch:
            try:
                image, caption = self._pairs[index]
            except BrokenSample as error:
                skipped.append(Skipped(error.name, error.reason))
                continue
            rows.append(index)
            images.append(self._prepare(image, index))
            captions.append(caption)
        return rows, np.concatenate(images) if images else np.empty(0, np.uint8), captions, skipped


def write_skipped(path: Path, skipped: Iterable[Skipped]) -> int:
    """Write names and reasons as JSON lines; how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for name, reason in skipped:
            file.write(json.dumps({"name": name, "reason": reason}) + "\n")
            count += 1
    return count


def read_skipped(folder: Path, shards: int) -> Iterator[Skipped]:
    """What could not be read, over all shards in order."""
    for number in range(shards):
        with (shard_folder(folder, number) / SKIPPED).open(encoding="utf-8") as file:
            for line in file:
                yield Skipped(**json.loads(line))
