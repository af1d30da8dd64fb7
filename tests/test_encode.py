"""Images encoded once: the same codes after a kill and by several processes, every byte checked when it is read."""

import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_fast.data import (
    Batches,
    BrokenSample,
    EncodedPairs,
    Encoding,
    JobOptions,
    Pair,
    Skipped,
    augment_dalle,
    center_crop_resize,
    encode_pairs,
)
from dalle_fast.pipeline import find_system

GRID, SIZE = (3, 4), 12


class Images:
    """n images of which some are broken."""

    def __init__(self, n: int, broken: tuple[int, ...] = (), seed: int = 0) -> None:
        self.n = n
        self.broken = broken
        self.seed = seed
        self.skipped = [Skipped("elsewhere.png", "no caption")]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Pair:
        if index in self.broken:
            raise BrokenSample(self.name(index), "torn")
        image = np.random.default_rng((self.seed, index)).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        return Pair(image, self.caption(index))

    def caption(self, index: int) -> str:
        return f"caption {index}\n\u2028 ü"

    def name(self, index: int) -> str:
        return f"image {index}"


def encode(images: torch.Tensor) -> torch.Tensor:
    """Codes that any change of an image changes."""
    means = torch.nn.functional.adaptive_avg_pool2d(images[:, 0].double(), GRID)
    return (means * 65535).long()


def encoding(**options) -> Encoding:
    return Encoding(**({"image_size": SIZE, "grid": GRID, "fingerprint": "abc", "shard_size": 4} | options))


def write(folder: Path, pairs: Images, **options) -> EncodedPairs | None:
    job = {name: options.pop(name) for name in ("workers", "rank", "ranks") if name in options}
    job["batch_size"] = options.pop("batch_size", 2)
    return encode_pairs(folder, pairs, encode, encoding(**options), JobOptions(**job))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def codes_of(image: np.ndarray) -> np.ndarray:
    return encode(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)[0].numpy()


# ---------------------------------------------------------------------------------------------- writing


def test_codes_and_captions_come_back(tmp_path: Path) -> None:
    pairs = Images(10, broken=(1, 9))
    encoded = write(tmp_path / "codes", pairs)
    good = [i for i in range(10) if i not in pairs.broken]
    assert (len(encoded), encoded.grid, encoded.draws, encoded.fingerprint) == (8, GRID, 1, "abc")
    assert encoded.skipped_count == 3
    for i, pair in zip(good, encoded, strict=True):
        assert pair.codes.dtype == np.int64
        assert np.array_equal(pair.codes, codes_of(center_crop_resize(pairs[i].image, SIZE)))
        assert pair.caption == pairs.caption(i)
    assert list(encoded.captions()) == [pairs.caption(i) for i in good]
    with pytest.raises(IndexError, match="index: expected 0 to 7, got 8"):
        encoded[8]
    lines = (tmp_path / "codes" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"name": "elsewhere.png", "reason": "no caption"},
        {"name": "image 1", "reason": "torn"},
        {"name": "image 9", "reason": "torn"},
    ]


def test_draws_follow_from_seed_and_image(tmp_path: Path) -> None:
    pairs = Images(6, broken=(2,))
    encoded = write(tmp_path / "codes", pairs, draws=3, seed=5)
    for row, i in enumerate((0, 1, 3, 4, 5)):
        for draw in range(3):
            image = augment_dalle(pairs[i].image, SIZE, np.random.default_rng((5, i, draw)))
            assert np.array_equal(encoded.seen_in(draw, row).codes, codes_of(image))
    others = write(tmp_path / "others", pairs, draws=3, seed=6)
    assert not np.array_equal(others.seen_in(0, 0).codes, encoded.seen_in(0, 0).codes)


def test_each_epoch_sees_another_draw(tmp_path: Path) -> None:
    encoded = write(tmp_path / "codes", Images(5), draws=3)
    of_caption = {encoded[i].caption: i for i in range(5)}
    batches = Batches(encoded, 5, lambda pair, _: pair._asdict(), seed=0)
    for epoch in range(7):
        batch = batches.batch_at(epoch)
        for codes, caption in zip(batch["codes"], batch["caption"], strict=True):
            assert np.array_equal(codes, encoded.seen_in(epoch % 3, of_caption[caption]).codes)


def test_a_shard_of_broken_images_is_empty(tmp_path: Path) -> None:
    encoded = write(tmp_path / "codes", Images(10, broken=(0, 1, 2, 3, 9)))
    assert [pair.caption for pair in encoded] == [Images(10).caption(i) for i in range(4, 9)]
    with pytest.raises(ValueError, match="pairs: expected at least one readable image, got none"):
        write(tmp_path / "none", Images(2, broken=(0, 1)))


# ---------------------------------------------------------------------------------------------- going on


class Stop(Exception):
    pass


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    """A run that fails in the third shard goes on there, and the bytes are those of one that did not fail."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    pairs = Images(14, broken=(5,))
    write(whole, pairs, draws=2)
    calls = itertools.count()

    def fails(images: torch.Tensor) -> torch.Tensor:
        if next(calls) == 9:
            raise Stop
        return encode(images)

    arguments = encoding(draws=2), JobOptions(batch_size=2)
    with pytest.raises(Stop):
        encode_pairs(resumed, pairs, fails, *arguments)
    assert [path.name for path in sorted(resumed.glob("shard-*"))] == ["shard-00000", "shard-00001"]
    with pytest.raises(ValueError, match=r"expected a folder with meta\.json of a finished encoding"):
        EncodedPairs(resumed)
    (resumed / ".shard-00002.99.partial").mkdir()  # as a kill leaves it
    counted: list[int] = []

    def counts(images: torch.Tensor) -> torch.Tensor:
        counted.append(len(images))
        return encode(images)

    encode_pairs(resumed, pairs, counts, *arguments)
    assert sum(counted) == 6 * 2
    assert files(resumed) == files(whole)
    encode_pairs(resumed, pairs, counts, *arguments)
    assert sum(counted) == 6 * 2


def test_any_number_of_processes_writes_the_same(tmp_path: Path) -> None:
    pairs = Images(19, broken=(5, 17))
    write(tmp_path / "alone", pairs)
    write(tmp_path / "workers", pairs, workers=2)
    parts = [write(tmp_path / "ranks", pairs, rank=rank, ranks=3) for rank in (2, 0, 1)]
    assert [part is None for part in parts] == [True, True, False]
    assert len(parts[2]) == 17
    assert files(tmp_path / "workers") == files(tmp_path / "ranks") == files(tmp_path / "alone")


def test_a_kill_loses_the_shard_at_work(tmp_path: Path) -> None:
    """kill -9 of the command at any moment; the same command ends with the same bytes."""
    code = (
        "import sys, torch, time; sys.path.insert(0, sys.argv[1]); import test_encode as t; from pathlib import Path\n"
        "torch.set_num_threads(1); slow = t.encode\n"
        "t.encode = lambda images: (time.sleep(0.01), slow(images))[1]\n"
        "t.write(Path(sys.argv[2]), t.Images(40))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "killed")]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "killed").glob("shard-*"))) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "killed" / "meta.json").exists()
    write(tmp_path / "killed", Images(40))
    write(tmp_path / "whole", Images(40))
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_processes_share_the_command(cli: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """As torchrun starts them; a training takes an unfinished folder for what it is."""
    (tmp_path / "in").mkdir()
    for i in range(5):
        Image.fromarray(Images(5)[i].image).save(tmp_path / "in" / f"{i}.png")
        (tmp_path / "in" / f"{i}.txt").write_text(f"image {i}")
    system = tmp_path / "system"
    system.mkdir()
    for name in ("tokenizer.json", "dvae.safetensors"):
        shutil.copy(find_system("tiny") / name, system)
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = ["encode", "--data", str(tmp_path / "in"), "--out", str(tmp_path / "codes"), "--draws", "3"]
    for rank, said in (
        (1, "this process has done its part"),
        (0, "5 images as 8 x 8 codes in 3 draws"),
    ):
        monkeypatch.setenv("RANK", str(rank))
        assert cli.main(args) == 0
        assert said in capsys.readouterr().out
        if rank == 1:
            assert cli.main(["train", "dalle", "--data", str(tmp_path / "codes"), "--out", str(system)]) == 2
            assert "expected a folder with meta.json of a finished encoding" in capsys.readouterr().err
    assert EncodedPairs(tmp_path / "codes").draws == 3
    assert cli.main([*args, "--seed", "1"]) == 2
    assert "seed: expected 0, with which" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pairs", "changes", "message"),
    [
        (Images(6), {"draws": 2}, "draws: expected 1, with which .* was begun, got 2"),
        (Images(6), {"seed": 1}, "seed: expected 0"),
        (Images(6), {"shard_size": 3}, "shard_size: expected 4"),
        (Images(7), {}, "source: expected"),
        (Images(6), {"draws": 0}, "draws: expected 1 or more, got 0"),
        (Images(6), {"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
        (Images(6), {"workers": -1}, "workers: expected 0 or more, got -1"),
        (Images(6), {"rank": 2, "ranks": 2}, "rank: expected 0 to 1, got 2"),
    ],
)
def test_other_settings_are_refused(pairs, changes, message, tmp_path: Path) -> None:
    write(tmp_path / "codes", Images(6))
    before = files(tmp_path / "codes")
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "codes", pairs, **changes)
    assert files(tmp_path / "codes") == before


def test_processes_may_begin_at_once(tmp_path: Path) -> None:
    """While one writes the settings, another finds no folder of something else."""
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / ".settings.json.1234.partial").write_text("{")
    assert len(write(tmp_path / "codes", Images(3))) == 3


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="output folder: expected a new or empty one, or one to go on with"):
        write(tmp_path, Images(1))
    (tmp_path / "settings.json").write_text("[")
    with pytest.raises(ValueError, match=r"output folder: expected settings in .*settings\.json"):
        write(tmp_path, Images(1))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (lambda images: encode(images)[:, :2], r"codes: expected integers \[B, 3, 4\], got torch.int64 \[2, 2, 4\]"),
        (lambda images: encode(images).double(), r"codes: expected integers \[B, 3, 4\], got torch.float64"),
        (lambda images: encode(images) + 65536, "codes: expected 0 to 65535, got"),
        (lambda images: -1 - encode(images), "codes: expected 0 to 65535, got"),
    ],
)
def test_codes_that_do_not_fit(codes, message, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        encode_pairs(tmp_path / "codes", Images(2), codes, encoding())
    assert list((tmp_path / "codes").iterdir()) == [tmp_path / "codes" / "settings.json"]


# ---------------------------------------------------------------------------------------------- damage


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    """Of codes, captions and index, when the pair is read; and the message names the shard."""
    folder = tmp_path / "codes"
    write(folder, Images(10), draws=2)
    shard = folder / "shard-00001"
    rng = np.random.default_rng(0)
    for name, header in (("codes.npy", 128), ("captions.txt", 0), ("index.npy", 128)):
        whole = (shard / name).read_bytes()
        for place in rng.integers(header, len(whole), 12):
            if name == "captions.txt" and whole[place] == ord("\n"):
                continue  # what ends a caption is not read
            content = bytearray(whole)
            content[place] ^= 1 << int(rng.integers(8))
            (shard / name).write_bytes(content)
            encoded = EncodedPairs(folder)
            for i in (0, 1, 2, 3, 8, 9):  # of other shards
                encoded.seen_in(1, i)
            with pytest.raises(ValueError, match=r"encoded pairs: expected .*shard-00001 as it was written, got other"):
                for i, draw in itertools.product(range(4, 8), range(2)):
                    encoded.seen_in(draw, i)
        (shard / name).write_bytes(whole)
    assert len(list(EncodedPairs(folder))) == 10


def test_missing_and_truncated_files_are_found_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    write(folder, Images(10))
    before = files(folder)
    for name in ("codes.npy", "captions.txt", "index.npy"):
        path = folder / "shard-00002" / name
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=rf"expected \d+ bytes in .*shard-00002/{name}, got \d+ bytes"):
            EncodedPairs(folder)
        path.unlink()
        with pytest.raises(ValueError, match=rf"expected \d+ bytes in .*shard-00002/{name}, got no such file"):
            EncodedPairs(folder)
        shutil.rmtree(path.parent)  # as the message of a damaged shard advises
        write(folder, Images(10))
        assert files(folder) == before
    for content in ("{}", "[]", "no JSON", '{"format": "dalle_fast.encoded"}'):
        (folder / "meta.json").write_text(content)
        with pytest.raises(ValueError, match=r"encoded pairs: expected a folder with meta\.json"):
            EncodedPairs(folder)
    with pytest.raises(ValueError, match=r"encoded pairs: expected a folder with meta\.json, got"):
        EncodedPairs(tmp_path / "nowhere")


# ---------------------------------------------------------------------------------------------- reading


def test_many_shards_need_no_open_files(tmp_path: Path) -> None:
    encoded = write(tmp_path / "codes", Images(50), shard_size=1)
    before = len(os.listdir("/proc/self/fd"))
    assert len(list(encoded)) == 50
    assert len(os.listdir("/proc/self/fd")) == before


def test_workers_read_the_same(tmp_path: Path) -> None:
    encoded = write(tmp_path / "codes", Images(9), draws=2)
    encoded[0]  # maps a shard, which a pickle leaves behind
    assert len(pickle.dumps(encoded)) < 1000
    copy = pickle.loads(pickle.dumps(encoded))
    assert np.array_equal(copy.seen_in(1, 8).codes, encoded.seen_in(1, 8).codes)
    alone, helped = (Batches(encoded, 4, lambda pair, _: pair._asdict(), seed=0, workers=w) for w in (0, 2))
    for first, second in itertools.islice(zip(alone.iterate(), helped.iterate(), strict=False), 5):
        assert torch.equal(first["codes"], second["codes"])
        assert first["caption"] == second["caption"]


def test_all_captions_of_an_image_are_encoded_and_seen_in_turn(tmp_path: Path) -> None:
    class Several(Images):
        def all_captions(self, index: int) -> list[str]:
            return [f"{index} {word}" for word in ("one", "two", "three")[: index + 1]]

        def caption(self, index: int) -> str:
            return self.all_captions(index)[0]

    encoded = write(tmp_path / "codes", Several(5), draws=2)
    assert [encoded.seen_in(epoch, 4).caption for epoch in range(4)] == ["4 one", "4 two", "4 three", "4 one"]
    assert [encoded.seen_in(epoch, 0).caption for epoch in range(2)] == ["0 one"] * 2
    assert [encoded.seen_in(epoch, 1).caption for epoch in range(3)] == ["1 one", "1 two", "1 one"]
    assert encoded[3].caption == "3 one"
    assert len(list(encoded.captions())) == 1 + 2 + 3 + 3 + 3
    assert any(not np.array_equal(encoded.seen_in(0, i).codes, encoded.seen_in(1, i).codes) for i in range(5))
