"""Many processes train what one does: four of them, as one, two or four nodes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.many_processes import run_all
from helpers.training import DALLE, DVAE, checkpoint, part, same, tokenizer
from PIL import Image
from torch import nn

from dalle_fast.distributed.start import new_model
from dalle_fast.distributed.world import ALONE, World, join_world
from dalle_fast.models import DiscreteVAE, load_model, save_model

TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
PARALLEL = ("2x2", "ddp")


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("many")


@pytest.fixture(scope="module")
def said(out) -> dict[str, list[dict]]:
    """Results of the processes of each training, by rank."""
    return run_all(out)


def log(folder: Path, kind: str) -> list[dict]:
    lines = (folder / kind / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def assert_close(got: list[dict], expected: list[dict], rtol: float) -> None:
    """The same records of a log, to rounding."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=rtol), (name, a["step"])


@pytest.mark.parametrize("layout", PARALLEL)
def test_many_processes_train_what_one_does(layout, said, out):
    one, many = out / "float32 one", out / f"float32 {layout}"
    assert_close(log(many, "dalle"), log(one, "dalle"), rtol=1e-5)
    exported, expected = (load_model(folder / "dalle.safetensors").state_dict() for folder in (many, one))
    torch.testing.assert_close(exported, expected, rtol=1e-3, atol=1e-5)  # Adam divides small gradients by as small


def test_each_process_holds_its_shards_only(said):
    total = said["float32 one"][0]["parameters"]
    for layout, shards in {"2x2": 2, "ddp": 1}.items():
        held = [process["parameters"] for process in said[f"float32 {layout}"]]
        assert sum(held) == total * 4 / shards
        assert max(held) < 1.01 * total / shards
        assert [process["device"] for process in said[f"float32 {layout}"]] == ["cpu", "meta", "meta", "meta"]


def test_no_process_ever_holds_a_whole_model(said):
    """All shards together are the model that one process makes; each holds its own, and one whole parameter at most."""
    for process in said["starts 1x4"]:
        for start in process:
            assert start["same"]
            assert start["held"] < start["whole"] / 3
            assert start["peak"] < 1.1 * start["held"] + start["largest"] < start["whole"]


def test_a_gradient_that_is_not_finite_in_one_process_skips_the_step_in_all(said, out):
    one, many = said["float16 one"][0]["scales"], [process["scales"] for process in said["float16 2x2"]]
    assert many == [many[0]] * 4
    scales = torch.tensor(many[0])  # [steps, resblocks]
    assert (scales[1] < scales[0]).all()
    assert (scales[2] > scales[1]).all()
    torch.testing.assert_close(scales, 4 * torch.tensor(one))
    got, expected = (
        [record for record in log(out / f"float16 {layout}", "dalle") if "log2_scales" not in record]
        for layout in ("2x2", "one")
    )
    assert_close(got, expected, rtol=1e-3)
    assert [record["skipped_updates"] for record in got if "lr" in record] == [0, 1, 1]


@pytest.mark.parametrize("layout", ["one", "1x4", "4x1"])
def test_a_checkpoint_is_resumed_by_other_processes_bit_by_bit(layout, said, out):
    saved, resumed = (checkpoint(out / name, "dalle") for name in ("float16 2x2", f"resaved {layout}"))
    assert "scales/scale" in saved
    assert any(value.dtype == torch.int16 for value in part(saved, "optimizer").values())
    assert same({**resumed, "random": saved["random"]}, saved)


def test_powersgd_of_full_rank_trains_what_one_process_does(said, out):
    got, expected = (
        [record for record in log(out / name, "dalle") if "log2_scales" not in record]
        for name in ("powersgd 2x2", "float16 one")
    )
    sent = [record.pop("bytes_between_machines") for record in got if "lr" in record]
    assert [sent[0], 2 * sent[0], 3 * sent[0]] == sent
    assert_close(got, expected, rtol=1e-2)
    assert [record["skipped_updates"] for record in got if "lr" in record] == [0, 1, 1]


def test_what_powersgd_has_left_over_is_shared_among_other_nodes(said, out):
    saved, resumed = (checkpoint(out / name, "dalle") for name in ("powersgd 2x2", "powersgd resaved 4x1"))
    left, shared = part(saved, "powersgd"), part(resumed, "powersgd")
    assert left.keys() == {name for name in part(saved, "model") if re.search(r"^layers.*(attn|mlp)\..*weight", name)}
    assert all(tensor.any() for tensor in left.values())
    torch.testing.assert_close(shared, left, rtol=2**-9, atol=0)  # rounded to 1-6-9 anew
    rest = [
        {k: v for k, v in content.items() if not k.startswith(("powersgd", "random"))} for content in (saved, resumed)
    ]
    assert same(*rest)


def test_clip_tells_captions_from_those_of_all_processes(said, out):
    got, expected = (log(out / f"clip {layout}", "clip") for layout in ("2x2", "one"))
    assert {"loss", "val_loss"} <= {name for record in expected for name in record}
    assert_close(got, expected, rtol=1e-4)


def test_the_dvae_trains_in_many_processes(said, out):
    values = {process["val_loss"] for process in said["dvae 2x2"]}
    assert len(values) == 1
    assert load_model(out / "dvae 2x2" / "dvae.safetensors", "dvae")


class Replaced(nn.Module):
    """Has a layer whose weight is not the one that it was made with, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.first.weight = nn.Parameter(torch.empty(5, 3))
        nn.init.normal_(self.first.weight, std=0.1)
        self.register_buffer("count", torch.empty(2))
        nn.init.ones_(self.count)
        self.second = nn.Linear(5, 2)


def test_a_late_start_draws_what_an_early_one_does():
    state = torch.get_rng_state()
    model, start = new_model(Replaced, 3, World(size=2))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    start.write(model, World(size=2))
    early, nothing = new_model(Replaced, 3)
    assert nothing is None
    assert same(dict(model.state_dict()), dict(early.state_dict()))
    assert torch.equal(torch.get_rng_state(), state)


class Unfilled(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class Scaled(nn.Linear):
    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.mul_(2)


def test_a_constructor_whose_start_would_be_lost_is_refused():
    with pytest.raises(ValueError, match="bias: expected the constructor to fill it in place, got nothing that does"):
        new_model(partial(Unfilled, 2, 2), 0, World(size=2))
    with pytest.raises(TypeError, match=r"expected .*aten.normal_.default.* to write into tensors, got aten.mul_"):
        new_model(partial(Scaled, 2, 2), 0, World(size=2))


@pytest.mark.parametrize(
    ("environment", "device", "message"),
    [
        ({"LOCAL_WORLD_SIZE": "2"}, "cuda:0", "device: expected one of cpu, cuda with many processes, got cuda:0"),
        ({}, "cpu", "expected LOCAL_WORLD_SIZE to be a number, as torchrun sets it, got None"),
        ({"LOCAL_WORLD_SIZE": "3"}, "cpu", "got RANK=1, WORLD_SIZE=4, LOCAL_WORLD_SIZE=3"),
        ({"LOCAL_WORLD_SIZE": "2", "RANK": "4"}, "cpu", "got RANK=4, WORLD_SIZE=4, LOCAL_WORLD_SIZE=2"),
        ({"WORLD_SIZE": "many"}, "cpu", "expected WORLD_SIZE to be a number, as torchrun sets it, got many"),
    ],
)
def test_an_environment_that_torchrun_would_not_make_is_refused(environment, device, message, monkeypatch):
    for name, value in ({"RANK": "1", "WORLD_SIZE": "4"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)), join_world(device):
        pass


def test_without_torchrun_there_is_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_world("cpu") as world:
        assert world is ALONE
    assert (world.rank, world.size, world.copies, world.shard) == (0, 1, 1, 0)
    assert world.ask_first(lambda: 3) == world.largest(3) == 3
    assert world.gather("a") == ["a"]


def test_a_signal_to_one_process_stops_all_after_the_same_step(said, out):
    assert [process["stopped"] for process in said["stopped 2x2"]] == [[signal.SIGTERM, 2]] * 4
    assert checkpoint(out / "stopped 2x2", "dalle")["step"] == 2
    assert load_model(out / "stopped 2x2" / "dalle.safetensors")


# ---------------------------------------------------------------------------------------------- torchrun


STEPS = 40


def a_system(folder: Path) -> Path:
    """A folder with images, a tokenizer and a dVAE, to train the transformer on."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
        (folder / "images" / f"{i}.txt").write_text(f"picture {i}")
    tokenizer().save(folder / "tokenizer.json")
    torch.manual_seed(0)
    save_model(DiscreteVAE(DVAE), folder / "dvae.safetensors")
    return folder


def training(folder: Path) -> list[str]:
    """The command that trains the transformer, and its options."""
    sizes = {f"model.{name}": value for name, value in asdict(DALLE).items()}
    settings = {"steps": STEPS, "batch-size": 8, "log-every": 1, "save-every": 3, "lr": 1e-3}
    values = sizes | {f"train.{name}": value for name, value in settings.items()}
    options = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return ["train", "dalle", "--data", str(folder / "images"), "--out", str(folder), *options]


def workers(launcher: int) -> dict[int, int]:
    """The processes that a torchrun has started, by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = [re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_bytes()) for child in children]
    return {int(rank[1]): int(child) for rank, child in zip(ranks, children, strict=True) if rank}


def test_a_killed_worker_is_replaced_and_the_run_goes_on_from_the_last_save(cli, tmp_path):
    many, one = a_system(tmp_path / "many"), a_system(tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*torchrun, "-m", "dalle_fast.cli", *training(many)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while not list((many / "dalle" / "checkpoints").glob("step-*[0-9]")):
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.02)
        os.kill(workers(run.pid)[1], signal.SIGKILL)
        assert log(many, "dalle")[-1]["step"] < STEPS
        said, complaints = run.communicate(timeout=300)
    assert run.returncode == 0, complaints
    assert said.count("dalle.safetensors") == 1  # one process speaks for all
    assert cli.main(training(one)) == 0
    assert [record["step"] for record in log(many, "dalle") if "loss" in record] == list(range(1, STEPS + 1))
    assert_close(log(many, "dalle"), log(one, "dalle"), rtol=1e-3)
