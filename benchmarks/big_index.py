"""Opening and looking up 250 million pairs: seconds, memory, lookups per second.

Run: python benchmarks/big_index.py [FOLDER]. It makes 25,000 shards of 10,000 samples and removes them again. The
shards are holes of 1 GB that take no room; their index files, 5 GB, are like those of real shards, and all differ.
About two minutes, mostly for making and removing them.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dalle_fast.data.open import find_shards
from dalle_fast.data.shuffle import shuffled
from dalle_fast.data.sources import tar_index as index
from dalle_fast.data.sources.tar import ShardPairs
from dalle_fast.data.sources.tar_samples import BLOCK, Record

SHARDS, SAMPLES = 25_000, 10_000
IMAGE_SIZE, CAPTION_SIZE = 100_000, 60  # bytes
BLOCKS = IMAGE_SIZE // BLOCK + 4  # of a sample: the image and its header, the caption and its header
WORKERS, LOOKUPS = 4, 20_000


def simulate(folder: Path) -> None:
    """Make the shards and their index files: in each shard the samples begin at another offset."""
    records = np.zeros(
        SAMPLES, [(name, "<u4") for name in Record._fields[:4]] + [(name, "<u2") for name in Record._fields[4:]]
    )
    records["image"] = np.arange(SAMPLES) * BLOCKS + 1
    records["caption"] = np.arange(SAMPLES) * BLOCKS + BLOCKS - 1
    records["image_size"], records["caption_size"], records["header"] = IMAGE_SIZE, CAPTION_SIZE, 1
    assert records.itemsize == index.RECORD.size
    for number in range(SHARDS):
        shard = folder / f"{number:05d}.tar"
        with shard.open("wb") as file:
            file.truncate((number + SAMPLES * BLOCKS) * BLOCK)
        moved = records.copy()
        moved["image"] += number
        moved["caption"] += number
        index.write_index(str(shard), shard.stat(), moved.tobytes(), [])


def forget(folder: Path) -> None:
    """Drop the index files from the page cache."""
    os.sync()
    for path in (folder / index.FOLDER).iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def memory(kind: str) -> float:
    """MB of this process: Rss counts all its pages; Pss divides each by the processes that share it."""
    match = re.search(rf"^{kind}: *(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)
    assert match
    return int(match[1]) / 1e3


def look_up(pairs: ShardPairs) -> float:
    """Seconds per lookup in the order of training."""
    numbers = shuffled(np.arange(LOOKUPS), len(pairs), seed=0, epoch=0).tolist()
    start = time.perf_counter()
    for number in numbers:
        pairs.find(number)
    return (time.perf_counter() - start) / LOOKUPS


def check(pairs: ShardPairs) -> None:
    """Assert that lookups find what ``simulate`` wrote."""
    assert len(pairs) == SHARDS * SAMPLES
    for number in np.random.default_rng(0).integers(len(pairs), size=1_000).tolist():
        shard, i = divmod(number, SAMPLES)
        at = shard + i * BLOCKS
        assert pairs.find(number)[1] == Record(at + 1, IMAGE_SIZE, at + BLOCKS - 1, CAPTION_SIZE, 1, 0)


def measure(folder: Path) -> dict[str, Any]:
    forget(folder)
    before = memory("Rss")
    result: dict[str, Any] = {}
    for name in ("cold", "warm"):
        start = time.perf_counter()
        pairs = ShardPairs(find_shards(folder))
        result[f"start-up {name}, s"] = time.perf_counter() - start
    result["memory, MB"] = memory("Rss") - before
    for name in ("cold", "warm"):
        result[f"lookups/s {name}"] = 1 / look_up(pairs)
    result[f"memory after {2 * LOOKUPS} lookups, MB"] = memory("Rss") - before
    check(pairs)

    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(WORKERS), fork.SimpleQueue()

    def work() -> None:
        gc.freeze()  # as data workers do
        begin = memory("Private_Dirty")
        seconds = look_up(pairs)
        barrier.wait()
        answers.put((seconds, memory("Pss"), memory("Private_Dirty") - begin))
        barrier.wait()

    workers = [fork.Process(target=work) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    seconds, proportional, own = zip(*(answers.get() for _ in workers), strict=True)
    for worker in workers:
        worker.join()
    result[f"lookups/s of {WORKERS} workers"] = sum(1 / s for s in seconds)
    result["proportional memory of a worker, torch and all, MB"] = max(proportional)
    result[f"memory that {LOOKUPS} lookups add to a worker, MB"] = max(own)
    return result


def main(folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder, prefix="big_index.") as name:
        simulate(Path(name))
        return measure(Path(name))


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.gettempdir())), indent=2))
