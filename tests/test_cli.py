"""Every command as a process of its own: its files, its output and its errors."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_fast import pipeline
from dalle_fast.config import PRESETS
from dalle_fast.data import EncodedPairs
from dalle_fast.models import load_model, save_model
from dalle_fast.training import TrainingDiverged
from dalle_fast.training.settings import TRAIN_PRESETS

cli = pytest.importorskip("dalle_fast.cli")
STEPS = ["--train.steps", "2", "--train.batch-size", "4", "--train.val-samples", "4"]
SMALL = {
    "tokenizer": ["--vocab-size", "280", "--text-len", "8"],
    "dvae": shlex.split(
        "--model.image-size 8 --model.n-hid 8 --model.n-init 8 --model.groups 1 2 --model.vocab-size 16"
    ),
    "clip": shlex.split(
        "--model.image-size 8 --model.patch-size 4 --model.vision-width 16 --model.vision-layers 1 --model.text-vocab "
        "280 --model.text-len 8 --model.text-width 16 --model.text-layers 1 --model.head-dim 8 --model.embed-dim 8"
    ),
    "dalle": shlex.split(
        "--model.text-vocab 280 --model.text-len 8 --model.image-vocab 16 --model.height 4 --model.width 4 "
        "--model.d-model 16 --model.n-layer 2 --model.head-dim 8 --model.kernel 3"
    ),
}


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "dalle_fast.cli", *map(str, args)]


def run(*args: object) -> subprocess.CompletedProcess:
    result = subprocess.run(command(*args), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "Traceback" not in result.stderr, result.stderr
    return result


def ok(*args: object) -> str:
    result = run(*args)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder of six images, one of which is torn."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}")
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def system(corpus, tmp_path_factory) -> Path:
    """All four parts, each trained by its command."""
    out = tmp_path_factory.mktemp("system")
    said = ok("train", "tokenizer", "--data", corpus, "--out", out, *SMALL["tokenizer"])
    assert "280 tokens from 6 captions" in said
    for part in ("dvae", "clip", "dalle"):
        said = ok("train", part, "--data", corpus, "--val", corpus, "--out", out, *SMALL[part], *STEPS)
        assert str(out / f"{part}.safetensors") in said
        assert "val_loss" in said
    return out


def test_training_writes_one_folder(system):
    assert {path.name for path in system.iterdir()} == {
        "tokenizer.json", "dvae", "clip", "dalle", "dvae.safetensors", "clip.safetensors", "dalle.safetensors",
    }  # fmt: skip
    assert load_model(system / "dalle.safetensors").cfg.d_model == 16
    assert '"name": "5.png"' in (system / "dvae" / "skipped.jsonl").read_text()


def test_generate(system, tmp_path):
    options = ["--model", system, "--n", 4, "--top", 2, "--guidance", 2, "--top-k", 8, "--seed", 7]
    said = ok("generate", "image 3", "--out", tmp_path / "a.png", *options)
    assert "best 2 of 4" in said
    assert cli.main([*map(str, ["generate", "image 3", "--out", tmp_path / "b.png", *options])]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    Image.open(tmp_path / "a.png").verify()


def test_generate_from_an_image_prompt(system, corpus, tmp_path, capsys):
    args = ["generate", "image", "--model", system, "--n", 2, "--top", 1, "--out", tmp_path / "c.png"]
    assert cli.main([*map(str, args), "--image-prompt", str(corpus / "0.png"), "--rows", "2"]) == 0
    assert (tmp_path / "c.png").is_file()
    assert cli.main([*map(str, args), "--rows", "2"]) == 2
    assert "keep_rows" in capsys.readouterr().err


def test_reconstruct(system, corpus, tmp_path):
    said = ok("reconstruct", corpus / "0.png", corpus / "1.png", "--model", system, "--out", tmp_path / "r.png")
    assert "mean squared error" in said
    Image.open(tmp_path / "r.png").verify()


def test_encoded_images_train_the_transformer(system, corpus, tmp_path, capsys, monkeypatch):
    result = run("encode", "--data", corpus, "--out", tmp_path / "codes", "--model", system, "--batch-size", 2)
    assert result.returncode == 0, result.stderr
    assert "5 images as 4 x 4 codes" in result.stdout
    assert "1 broken samples left out, named in" in result.stderr
    assert '"name": "5.png"' in (tmp_path / "codes" / "skipped.jsonl").read_text()
    encoded = EncodedPairs(tmp_path / "codes")
    assert (len(encoded), encoded.grid, encoded[0].caption) == (5, (4, 4), "image 0")

    other = tmp_path / "system"
    other.mkdir()
    for name in ("tokenizer.json", "dvae.safetensors"):
        (other / name).write_bytes((system / name).read_bytes())
    ok("train", "dalle", "--data", tmp_path / "codes", "--out", other, *SMALL["dalle"], *STEPS)
    assert (other / "dalle.safetensors").is_file()

    dvae, hashed, hash_of = load_model(other / "dvae.safetensors"), [], pipeline.sha256_of
    dvae.encoder.blocks.input.b.data += 1
    save_model(dvae, other / "dvae.safetensors")
    (tmp_path / "val").symlink_to(tmp_path / "codes")
    monkeypatch.setattr(pipeline, "sha256_of", lambda path: hashed.append(path) or hash_of(path))
    again = ["train", "dalle", "--data", tmp_path / "codes", "--val", tmp_path / "val", "--out", other]
    assert cli.main([*map(str, again), *SMALL["dalle"], *STEPS]) == 2
    message = f"data: expected codes of the dVAE in {other}, got another dVAE's in {tmp_path / 'codes'}\n"
    assert capsys.readouterr().err.endswith(message)
    assert hashed == [other / "dvae.safetensors"]  # a large file, and once is enough


def test_info():
    said = ok("info")
    assert f"torch {torch.__version__}".split("+")[0] in said
    assert "kernels:" in said
    assert all(name in said for name in PRESETS)
    assert "97,616,006" in said  # encoder and decoder of the release


def test_demo_fills_its_folder(tmp_path):
    said = ok("demo", "--out", tmp_path, "--pairs", 150, "--captions", 1, "--steps", 2, 2, 1)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert said.endswith(json.dumps(metrics, indent=2) + "\n")
    assert f"{tmp_path / 'shipped.png'}: the best of 16 images for each" in said
    assert [line.partition(":")[0] for line in said.splitlines() if line.startswith("[")] == [
        "[1/6] scenes and tokenizer", "[2/6] dvae", "[3/6] codes of all scenes", "[4/6] dalle", "[5/6] clip",
        "[6/6] images and verdicts",
    ]  # fmt: skip
    assert said.index("shipped.png") < said.index("[1/6]")
    for name in ("shipped", "reconstructions", "sheet", "losses", "codes"):
        assert min(Image.open(tmp_path / f"{name}.png").size) > 100
    assert metrics["codes"] == 128 and 1 <= metrics["codes_used"] <= 128
    for side in ("seen", "held_out"):
        assert metrics[side]["captions"] == 1
        assert 0 <= metrics[side]["single"] <= metrics[side]["any"] <= 1
        assert metrics[f"detector_right_on_drawn_{side}"] >= 0.98
    assert ok("plot", tmp_path) == f"{tmp_path / 'losses.png'}\n"
    assert "expected the log of a training" in run("plot", tmp_path / "dvae").stderr


def test_help_is_quick_and_names_the_commands():
    said = ok("--help")
    assert all(name in said for name in ("demo", "train", "encode", "reconstruct", "generate", "info", "data", "plot"))
    code = "import sys, dalle_fast.cli; print(sorted({'torch', 'numpy', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_preset_decides_the_defaults(capsys):
    assert TRAIN_PRESETS.keys() == PRESETS.keys()
    for args, width in (
        (["--preset", "12B"], "3968"),
        (["--preset=2.8B"], "1920"),
        ([], str(PRESETS["tiny"].dalle.d_model)),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train", "dalle", *args, "--help"])
        assert stopped.value.code == 0
        assert f"(default: {width})" in capsys.readouterr().out


def test_ctrl_c_saves(corpus, tmp_path):
    long = ["--train.steps", "1000000", "--train.batch-size", "4", "--train.log-every", "1"]
    train = command("train", "dvae", "--data", corpus, "--out", tmp_path, *SMALL["dvae"], *long)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(train, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        log = tmp_path / "dvae" / "log.jsonl"
        deadline = time.monotonic() + 60
        while not (log.exists() and log.stat().st_size):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "saved after step" in said
    assert "Traceback" not in said
    assert list((tmp_path / "dvae" / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate", "a", "--out", "x.txt"], "out: expected a name that ends in"),
        (["generate", "a", "--model", "no-such-model"], "model: expected a folder or a built-in name"),
        (["generate", "a", "--image-prompt", "none.png"], "none.png"),
        (["generate", "a", "--temperature", "0"], "temperature: expected a finite number above 0, got 0.0"),
        (["generate", "a", "--top-p", "1.5"], "top_p: expected a share in (0, 1], got 1.5"),
        (["reconstruct"], "images: expected at least one, got none"),
        (["encode", "--data", "scenes", "--out", "x", "--batch-size", "0"], "batch_size: expected 1 or more"),
        (["train", "dvae", "--data", "nowhere", "--out", "x"], "source: expected a folder"),
        (["train", "clip", "--data", "scenes", "--out", "x"], "dalle-fast train tokenizer"),
        (["train", "dvae", "--data", "scenes", "--out", "x", "--train.steps", "0"], "steps: expected 1 or more"),
        (
            ["train", "dvae", "--data", "scenes", "--out", "x", "--model.image-size", "33"],
            "image_size: expected a multiple",
        ),
        (["data", "index", "nowhere"], "shards: expected a .tar, a folder of them or a glob, got nowhere"),
        (["data", "filter", "--data", "scenes", "--out", "x", "--language", "xx"], "language: expected one of ar, cs"),
        (["data", "dedup", "--data", "scenes", "--out", "x", "--batch-size", "0"], "batch_size: expected 1 or more"),
        (["data", "emoji", "--out", "x", "--font", "none.ttf"], "font: expected Noto Color Emoji"),
    ],
)
def test_bad_input_is_one_clear_line(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(args)
    except SystemExit as stopped:  # tyro's own way to end, for values that do not parse
        code = stopped.code
    said = " ".join(re.sub("[─-╿]", " ", capsys.readouterr().err).split())  # without the box
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert "dummy" not in said
    assert not list(tmp_path.glob("*.png"))


def test_a_file_that_is_no_image(tmp_path, capsys):
    (tmp_path / "torn.png").write_bytes(b"no image")
    assert cli.main(["reconstruct", str(tmp_path / "torn.png"), "--out", str(tmp_path / "out.png")]) == 2
    assert "image: expected an image file" in capsys.readouterr().err


def test_bad_input_of_a_process():
    result = run("generate", "a red circle", "--model", "no-such-model")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("dalle-fast: model: expected")
    assert result.stderr.count("\n") == 1


def test_an_unknown_option_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["generate", "a", "--no-such-option", "3"])
    assert stopped.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err


def test_a_diverged_training_is_an_error_and_ctrl_c_ends(monkeypatch, capsys):
    def diverge() -> None:
        """Diverge."""
        raise TrainingDiverged("gradient: expected a finite one")

    def interrupt() -> None:
        """Interrupt."""
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "info", diverge)
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "dalle-fast: gradient: expected a finite one\n"
    monkeypatch.setattr(cli, "info", interrupt)
    assert cli.main(["info"]) == 130
