"""Long work on the images of a source, in shards that a killed run need not do again, by one process or by several.

The output is a folder of ``settings.json``, all that decides the result, and ``shard-00000/``, ``shard-00001/``, ...,
made of pairs 0 to ``shard_size - 1``, and so on. Each appears complete or not at all; its ``skipped.jsonl`` names the
pairs that could not be read. Shard i is the work of process i modulo their number, and depends on no other shard.
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
from .batches import collate, start_worker
from .pairs import SEPARATOR, BrokenSample, Pairs, Skipped, captions_at
from .sources.view import fingerprint_of

SETTINGS, SKIPPED = "settings.json", "skipped.jsonl"
Prepare = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """All that decides the result, beside the pairs: it must be the same when the work goes on."""

    fingerprint: str  # of the model
    image_size: int  # S, edge of the model's images
    shard_size: int  # pairs per shard

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError(f"shard_size: expected 1 or more, got {self.shard_size}")


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """The way in which a job is done, on which its result does not depend."""

    batch_size: int = 64  # images processed together
    workers: int = 0  # processes that read and prepare images ahead; 0 does it in this one
    rank: int = 0  # number of this process
    ranks: int = 1  # processes that share the work

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected 1 or more, got {self.batch_size}")
        if self.workers < 0:
            raise ValueError(f"workers: expected 0 or more, got {self.workers}")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank: expected 0 to {self.ranks - 1}, got {self.rank}")


DEFAULTS = JobOptions()


class Shard(NamedTuple):
    """The results for a range of pairs, without the broken ones."""

    rows: np.ndarray  # int64 [n], indices of the pairs
    values: np.ndarray  # [n, k, ...], for the k images made of each pair
    captions: list[str]  # one text per pair, with SEPARATOR between several captions


def process_in_shards(
    folder: str | Path,
    pairs: Pairs,
    settings: JobSettings,
    prepare: Prepare,
    process: Callable[[torch.Tensor], torch.Tensor],
    save: Callable[[Path, Shard], None],
    images_per_pair: int = 1,
    options: JobOptions = DEFAULTS,
) -> bool:
    """Do this process's part of the work, or what is left of it.

    Args:
        folder: a new one, or that of the same work.
        prepare: ``(image, index) -> uint8 [k, S, S, 3]``; makes the model's images of the image of a pair.
        process: float images [k * B, 3, S, S] in [0, 1] to values [k * B, ...].
        save: writes a shard to a folder.
        images_per_pair: k.

    Returns:
        True if all shards are done; else other processes are still at work.

    Raises:
        ValueError: the folder holds something else, or work with other settings.
    """
    folder = Path(folder)
    _settle(folder, {"source": fingerprint_of(pairs), "pairs": len(pairs), **asdict(settings)})
    shards = shard_folders(folder)
    todo = [number for number in range(len(shards))[options.rank :: options.ranks] if not shards[number].is_dir()]
    names = {shards[number].name for number in todo}
    for partial in folder.glob(".shard-*.partial"):  # of a run that was killed
        if partial.name.split(".")[1] in names:
            shutil.rmtree(partial)
    together = max(1, options.batch_size // images_per_pair)

    def stretches(number: int) -> list[range]:
        rows = range(len(pairs))[number * settings.shard_size :][: settings.shard_size]
        return [rows[start : start + together] for start in range(0, len(rows), together)]

    loader = DataLoader(
        _Prepared(pairs, prepare),
        batch_size=None,
        sampler=(stretch for number in todo for stretch in stretches(number)),
        num_workers=options.workers,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else the loader would draw from torch's global one
    )
    prepared = iter(loader)
    for number in tqdm(todo, unit="shard", desc=folder.name, disable=None):  # None: on a tty only
        skipped: list[Skipped] = []
        shard = _process((next(prepared) for _ in stretches(number)), process, skipped)
        with new_folder(shards[number]) as partial:
            save(partial, shard)
            write_skipped(partial / SKIPPED, skipped)
    return all(shard.is_dir() for shard in shards)


def _settle(folder: Path, settings: dict[str, Any]) -> None:
    """Begin a folder, or check that it was begun with the same settings."""
    path = folder / SETTINGS
    # Listed before the settings are looked for: of processes that begin at once, one may write them in between.
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    others = [name for name in names if name != SETTINGS and not name.startswith(f".{SETTINGS}.")]
    wanted = json.loads(json.dumps(settings))  # tuples become lists, as they are read back
    if path.is_file():
        try:
            found = dict(json.loads(path.read_text()))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"output folder: expected settings in {path}, got {error}") from None
        for name, value in wanted.items():
            if found.get(name) != value:
                raise ValueError(f"{name}: expected {found.get(name)}, with which {folder} was begun, got {value}")
    elif others or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"output folder: expected a new or empty one, or one to go on with, got {folder}")
    else:
        write_atomically(path, json.dumps(wanted, indent=2) + "\n")


def _process(prepared: Iterable[Any], process: Callable[[torch.Tensor], torch.Tensor], skipped: list[Skipped]) -> Shard:
    rows: list[int] = []
    values: list[np.ndarray] = []
    captions: list[str] = []
    for some_rows, images, some_captions, some_skipped in prepared:
        if some_rows:
            made = process(collate([{"image": image} for image in images.numpy()])["image"]).cpu().numpy()
            values.append(made.reshape(len(some_rows), -1, *made.shape[1:]))
        rows += some_rows
        captions += some_captions
        skipped += some_skipped
    return Shard(np.array(rows, np.int64), np.concatenate(values) if values else np.empty(0), captions)


class _Prepared(Dataset[tuple[list[int], np.ndarray, list[str], list[Skipped]]]):
    """Ranges of pairs, for DataLoader workers: rows, images [k * rows, S, S, 3], captions, broken samples."""

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
                several = captions_at(self._pairs, index)
            except BrokenSample as error:
                skipped.append(Skipped(error.name, error.reason))
                continue
            rows.append(index)
            images.append(self._prepare(image, index))
            captions.append(SEPARATOR.join(several) if len(several) > 1 else caption)
        return rows, np.concatenate(images) if images else np.empty(0, np.uint8), captions, skipped


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the work in a folder, among them ``source``, the fingerprint of the pairs, and their number.

    Raises:
        ValueError: they are damaged.
        OSError: there are none.
    """
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        sizes = settings["pairs"], settings["shard_size"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"settings: expected those of some work in {path}, got {error!r}") from None
    for name, size in zip(("pairs", "shard_size"), sizes, strict=True):
        if type(size) is not int or size < 1:
            raise ValueError(f"settings: expected {name} of 1 or more in {path}, got {size!r}")
    return settings


def shard_folders(folder: Path) -> list[Path]:
    """The folders of all shards in order, whether they are there or not."""
    settings = read_settings(folder)
    return [folder / f"shard-{number:05d}" for number in range(-(-settings["pairs"] // settings["shard_size"]))]


def write_skipped(path: Path, skipped: Iterable[Skipped]) -> int:
    """Write names and reasons as JSON lines. Returns their number."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for name, reason in skipped:
            file.write(json.dumps({"name": name, "reason": reason}) + "\n")
            count += 1
    return count


def read_skipped(folder: Path) -> Iterator[Skipped]:
    """The samples that could not be read, over all shards in order."""
    for shard in shard_folders(folder):
        path = shard / SKIPPED
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    fields = json.loads(line)
                    yield Skipped(str(fields["name"]), str(fields["reason"]))
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    raise ValueError(
                        f"skipped samples: expected lines of name and reason in {path}, got {error!r}"
                    ) from None
