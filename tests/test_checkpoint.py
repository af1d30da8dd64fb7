"""Checkpoints are complete or absent, and a run that is killed goes on as if it had not been."""

import json
import os
import random
import subprocess
import sys
import threading
import warnings
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.training import checkpoint, same, settings, task

from dalle_fast.training import fit
from dalle_fast.training.checkpoint import (
    CheckpointWriter,
    load_tensors,
    newest_checkpoint,
    random_state,
    saved_tensors,
    set_random_state,
)
from dalle_fast.training.state import check_values

RUN = {"fingerprint": {"kind": "dvae", "seed": 0}}


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {
        "model/w": torch.full((2, 3), float(step)),
        "optimizer/w/mean": torch.tensor([step, 65_535]).to(torch.uint16),
        "half": torch.tensor(step / 3, dtype=torch.bfloat16),
        "empty": torch.empty(0, dtype=torch.int64),
    }


def save(folder: Path, *steps: int, keep: int = 10) -> None:
    with CheckpointWriter(folder, keep) as writer:
        for step in steps:
            writer.save(step, tensors(step), RUN | {"step": step})
        writer.wait()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def load(path: Path) -> dict[str, torch.Tensor]:
    loaded = {name: torch.empty_like(t, device="cpu") for name, t in saved_tensors(path).items()}
    load_tensors(path, loaded)
    return loaded


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


# ---------------------------------------------------------------------------------------------- the format


def test_what_is_loaded_is_what_was_saved(tmp_path):
    values = {"step": 7, "list": [1, None, 0.1], "best": float("inf")}
    save(tmp_path, 7)
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(8, tensors(8), RUN | values)
    path, loaded = newest_checkpoint(tmp_path, RUN["fingerprint"])
    assert path == tmp_path / "step-00000008"
    assert values.items() <= loaded.items()
    assert same(load(path), tensors(8))


def test_no_checkpoint_is_none(tmp_path):
    assert newest_checkpoint(tmp_path / "never", {}) is None
    assert newest_checkpoint(tmp_path, {}) is None


def test_the_newest_are_kept(tmp_path):
    save(tmp_path, 5, 10, 15, 100_000_000, keep=2)
    assert names(tmp_path) == ["step-00000015", "step-100000000"]
    assert newest_checkpoint(tmp_path, RUN["fingerprint"])[1]["step"] == 100_000_000


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    written, write = threading.Event(), dcp.save

    def slowly(*args, **kwargs):
        assert written.wait(timeout=60)
        write(*args, **kwargs)

    monkeypatch.setattr(dcp, "save", slowly)
    with CheckpointWriter(tmp_path, keep=2) as writer:
        weight = torch.zeros(3)
        writer.save(1, {"w": weight}, RUN)  # returns at once
        weight.add_(1)  # the next step
        assert names(tmp_path) == []
        written.set()
        writer.wait()
    assert same(load(tmp_path / "step-00000001"), {"w": torch.zeros(3)})


def test_a_write_that_fails_is_raised_and_leaves_the_others(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full_disk(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with (
        CheckpointWriter(tmp_path, keep=1) as writer,
        pytest.raises(OSError, match=r"step-00000002: expected to write it, got no space left"),
    ):
        writer.save(2, tensors(2), RUN)
        writer.save(3, tensors(3), RUN)
    with pytest.warns(UserWarning, match=r"step-00000002\.tmp: ignored, it is incomplete"):
        path, _ = newest_checkpoint(tmp_path, RUN["fingerprint"])
    assert path.name == "step-00000001"


def test_what_a_killed_run_left_half_written_or_half_deleted_goes_with_the_next_checkpoint(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000002.tmp").mkdir()
    (tmp_path / "step-00000002.tmp" / "__0_0.distcp").write_bytes(b"half")
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip_a_bit(path / "__0_0.distcp"), r"damaged is __0_0\.distcp$"),
        (lambda path: flip_a_bit(path / ".metadata"), r"damaged is \.metadata$"),
        (lambda path: (path / "__0_0.distcp").unlink(), "No such file"),
        (lambda path: (path / "run.json").unlink(), "No such file"),
        (lambda path: (path / "run.json").write_text('{"step": '), r"damaged is run\.json"),
        (lambda path: (path / "run.json").write_text("[]"), r"damaged is run\.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(damage, message, tmp_path):
    save(tmp_path, 1, 2, 3)
    damage(tmp_path / "step-00000003")
    with pytest.warns(UserWarning, match=rf"step-00000003: ignored.*{message}"):
        path, _ = newest_checkpoint(tmp_path, RUN["fingerprint"])
    assert path.name == "step-00000002"
    save(tmp_path, 3)  # the run that goes on comes to that step again
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_checkpoint(tmp_path, RUN["fingerprint"])[0].name == "step-00000003"


def test_damaged_checkpoints_of_later_steps_do_not_count_as_the_newest(tmp_path):
    save(tmp_path, 1, 8, 9)
    flip_a_bit(tmp_path / "step-00000008" / "__0_0.distcp")
    flip_a_bit(tmp_path / "step-00000009" / "__0_0.distcp")
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-00000001", "step-00000004"]


def test_when_all_are_damaged_nothing_is_trained_anew(tmp_path):
    save(tmp_path, 1, 2)
    for path in tmp_path.iterdir():
        flip_a_bit(path / "__0_0.distcp")
    with (
        pytest.warns(UserWarning, match=r"step-0000000\d: ignored"),
        pytest.raises(ValueError, match=rf"expected an intact one in {tmp_path}, got 2, all damaged"),
    ):
        newest_checkpoint(tmp_path, RUN["fingerprint"])


def test_tensors_of_another_model_are_refused(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "step-00000001"
    for other in ({"model/v": torch.zeros(2, 3)}, {"model/w": torch.zeros(2, 4)}):
        with pytest.raises(ValueError, match=r"step-00000001: expected this run's tensors, got"):
            load_tensors(path, other)


def test_random_numbers_go_on(tmp_path):
    device = torch.device("cpu")
    numpy_normal = np.random.standard_normal
    random.gauss(0, 1)  # leaves a second number for the next call
    numpy_normal()  # this too
    state = json.loads(json.dumps(random_state(device)))

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), *numpy_normal(2), torch.rand(()).item()]

    expected = draw()
    assert draw() != expected
    set_random_state(state, device)
    assert draw() == expected


# ---------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [("dvae", {"seed": 4}, "seed=4"), ("dvae", {"batch_size": 5}, "batch_size=5"), ("clip", {}, "kind=clip")],
)
def test_a_checkpoint_of_another_run_is_refused(kind, changes, message, tmp_path):
    config = settings("dvae", steps=1)
    fit(task("dvae", config), config, tmp_path)
    (tmp_path / "clip").symlink_to(tmp_path / "dvae")
    before = checkpoint(tmp_path, "dvae")
    other = settings(kind, **changes)
    with pytest.raises(ValueError, match=rf"step-00000001: expected .*{message}.*, got .*resume nothing"):
        fit(task(kind, other), other, tmp_path)
    assert same(checkpoint(tmp_path, "dvae"), before)


def test_a_run_goes_on_from_the_newest_intact_checkpoint(tmp_path):
    config = settings("clip", save_every=2)
    fit(task("clip", config), config, tmp_path)
    folder = tmp_path / "clip" / "checkpoints"
    assert names(folder) == ["step-00000006", "step-00000007"]
    expected = checkpoint(tmp_path, "clip")
    flip_a_bit(folder / "step-00000007" / "__0_0.distcp")
    with pytest.warns(UserWarning, match="step-00000007: ignored"):
        fit(task("clip", config), config, tmp_path)
    again = checkpoint(tmp_path, "clip")
    assert same({**again, "seconds": 0}, {**expected, "seconds": 0})


def test_killed_fifty_times_at_any_moment(tmp_path):
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tests / "helpers" / "killed_run.py"), str(tmp_path), "50"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)

    kills = result["kills"]
    assert len(kills) == 50
    assert any(kill["torn"] for kill in kills)  # some died while writing
    saved = [kill["saved"] for kill in kills]
    assert saved == sorted(saved)  # no checkpoint was ever lost
    assert len(set(saved)) > 10
    # A save waits for the one before, so at most those of the steps since the last but one are not on the disk.
    assert all(0 <= kill["logged"] - kill["saved"] <= 2 * 3 for kill in kills)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert same({**checkpoint(killed, "toy"), "seconds": 0}, {**checkpoint(whole, "toy"), "seconds": 0})
    assert checkpoint(killed, "toy")["step"] == result["steps"]
    exported = [out / "toy.safetensors" for out in (killed, whole)]
    assert exported[0].read_bytes() == exported[1].read_bytes()

    def log(out: Path) -> list[dict]:
        lines = (out / "toy" / "log.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    assert log(killed) == log(whole)
    assert [record["step"] for record in log(killed)] == list(range(1, result["steps"] + 1))


# ---------------------------------------------------------------------------------------------- run.json


def trained(out: Path, kind: str = "dvae", steps: int = 3) -> Path:
    """Checkpoints of steps 1 to 3; the last one."""
    config = settings(kind, steps=steps, save_every=1, keep_checkpoints=3)
    fit(task(kind, config), config, out)
    return out / kind / "checkpoints" / f"step-{steps:08}"


def goes_on_from(out: Path, kind: str = "dvae") -> int:
    """The step from which the next run goes on."""
    config = settings(kind, steps=4)
    some = task(kind, config)
    first: list[int] = []
    batches = some.batches
    some.batches = lambda start: first.append(start) or batches(start)
    fit(some, config, out)
    return first[0]


def rewrite(path: Path, change, sign: bool = False) -> None:
    """Change run.json as a stranger might (``sign``), as an older version would have written it, or as damage does."""
    values = json.loads((path / "run.json").read_text())
    old = values.pop("checksum")
    change(values)
    checksum = {"checksum": zlib.crc32(json.dumps(values, sort_keys=True).encode())} if sign else {}
    assert old
    (path / "run.json").write_text(json.dumps({**checksum, **values}))


def test_every_change_of_a_digit_is_noticed(tmp_path):
    path = trained(tmp_path) / "run.json"
    text, draw = path.read_text(), random.Random(0)
    digits = [i for i, letter in enumerate(text) if letter.isdigit()]
    fingerprint = json.loads(text)["fingerprint"]
    for place in draw.sample(digits, 30):
        other = draw.choice([digit for digit in "0123456789" if digit != text[place]])
        path.write_text(text[:place] + other + text[place + 1 :])
        with pytest.warns(UserWarning, match="step-00000003: ignored, damaged is "):
            found, _ = newest_checkpoint(path.parent.parent, fingerprint)
        assert found.name == "step-00000002"


def test_a_checkpoint_without_a_checksum_is_read(tmp_path):
    path = trained(tmp_path)
    rewrite(path, lambda values: [values.pop("skipped_in_a_row"), values["fingerprint"].pop("corpus")])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "checkpoint")
        assert goes_on_from(tmp_path) == 3


WRONG = {
    "step": lambda v: v.update(step=2),
    "step far": lambda v: v.update(step=10**9),
    "step text": lambda v: v.update(step="3"),
    "step float": lambda v: v.update(step=3.0),
    "step missing": lambda v: v.pop("step"),
    "random missing": lambda v: v.pop("random"),
    "random short": lambda v: v["random"]["torch"].pop(),
    "random large": lambda v: v["random"]["torch"].__setitem__(5, 300),
    "random huge": lambda v: v["random"]["torch"].__setitem__(5, 10**30),
    "numpy place": lambda v: v["random"]["numpy"].__setitem__(2, 10**6),
    "python": lambda v: v["random"]["python"].__setitem__(1, [1, 2]),
    "random text": lambda v: v.update(random="abc"),
    "spikes": lambda v: v["spikes"].update(count="7"),
    "spikes nan": lambda v: v["spikes"].update(mean=float("nan")),
    "spikes list": lambda v: v.update(spikes=[]),
    "spikes more": lambda v: v["spikes"].update(more=1),
    "plateau": lambda v: v.update(plateau={"window": 1}),
    "fingerprint": lambda v: v.update(fingerprint=None),
    "fingerprint list": lambda v: v.update(fingerprint=[1]),
    "seconds": lambda v: v.update(seconds=-1),
    "seconds null": lambda v: v.update(seconds=None),
    "seconds huge": lambda v: v.update(seconds=10**400),
    "skipped": lambda v: v.update(skipped_updates=True),
    "skipped in a row": lambda v: v.update(skipped_in_a_row=1),
    "files": lambda v: v.update(files=7),
    "no files": lambda v: v.update(files={}),
    "files outside": lambda v: v["files"].update({"../../log.jsonl": 0}),
    "files device": lambda v: v["files"].update({"/dev/zero": 0}),
    "more": lambda v: v.update(more=1),
}


@pytest.mark.parametrize("sign", [True, False])
def test_values_of_other_types_count_as_damage(sign, tmp_path):
    path = trained(tmp_path)
    original = (path / "run.json").read_text()
    fingerprint = json.loads(original)["fingerprint"]
    check = partial(check_values, device=torch.device("cpu"))
    for name, change in WRONG.items():
        (path / "run.json").write_text(original)
        rewrite(path, change, sign)
        before = random_state(torch.device("cpu"))
        with pytest.warns(UserWarning, match=r"step-00000003: ignored, damaged is run\.json"):
            found, _ = newest_checkpoint(path.parent, fingerprint, check)
        assert found.name == "step-00000002", name
        assert same(random_state(torch.device("cpu")), before), name
    with pytest.warns(UserWarning, match=r"step-00000003: ignored"):
        assert goes_on_from(tmp_path) == 2


def test_run_json_in_pieces_counts_as_damage(tmp_path):
    path = trained(tmp_path)
    fingerprint = json.loads((path / "run.json").read_text())["fingerprint"]
    for content in (b"[" * 200_000, b'{"step":' * 100_000, b"\xff\xfe", b"null", b'"text"', b"", b"1" * 10_000):
        (path / "run.json").write_bytes(content)
        with pytest.warns(UserWarning, match=r"step-00000003: ignored, damaged is run\.json"):
            assert newest_checkpoint(path.parent, fingerprint)[0].name == "step-00000002"
