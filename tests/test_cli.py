"""Every command as a process of its own: its files, its output and its errors."""

import json
import os
import re
import shlex
import shutil
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


def test_generate_for_several_captions(system, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("image 2\n\n  image 1\n")
    out, options = tmp_path / "all", ["--model", str(system), "--n", "3", "--captions", str(tmp_path / "captions.txt")]
    assert cli.main(["generate", "image 1", *options, "--out", str(out), "--top", "2"]) == 0
    entries = json.loads((out / "scores.json").read_text())
    assert [entry["caption"] for entry in entries] == ["image 1"] * 2 + ["image 2"] * 2 + ["image 1"] * 2
    assert {path.name for path in out.iterdir()} == {"scores.json", *(entry["file"] for entry in entries)}
    assert all(Image.open(out / entry["file"]).size == (8, 8) for entry in entries)
    first, last = ([(e["place"], e["score"]) for e in part] for part in (entries[:2], entries[4:]))
    assert first == last and first[0][1] >= first[1][1]  # a caption's images do not depend on the others
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert cli.main(["generate", "image 1", *options, "--out", str(tmp_path / "all.png")]) == 2
    assert "out: expected a folder for 3 captions" in capsys.readouterr().err


def test_generate_cuts_long_captions_on_demand(system, tmp_path, capsys):
    args = ["generate", "zq" * 40, "--model", str(system), "--n", "2", "--out", str(tmp_path / "a.png")]
    assert cli.main(args) == 2
    assert "caption: expected at most 8 tokens" in capsys.readouterr().err
    assert cli.main([*args, "--truncate"]) == 0  # and --top is 2 where it is not given
    assert "best 2 of 2" in capsys.readouterr().out


def test_a_system_is_one_whole(system, corpus, tmp_path, capsys):
    """Training writes which parts belong together; another tokenizer does not replace that of models."""
    other = tmp_path / "system"
    shutil.copytree(system, other)
    before = (other / "tokenizer.json").read_bytes()
    train = ["train", "tokenizer", "--out", str(other), *SMALL["tokenizer"], "--data"]
    assert cli.main([*train, str(corpus)]) == 0  # the same one again
    assert cli.main([*train, "scenes"]) == 2
    assert "tokenizer: expected the one in" in capsys.readouterr().err
    assert (other / "tokenizer.json").read_bytes() == before
    for part in ("dalle", "clip"):
        assert "tokenizer" in load_model(other / f"{part}.safetensors").trained_with
    dvae = load_model(other / "dvae.safetensors")
    dvae.encoder.blocks.input.b.data += 1
    save_model(dvae, other / "dvae.safetensors")
    assert cli.main(["generate", "image", "--model", str(other), "--out", str(tmp_path / "a.png")]) == 2
    assert "dvae in" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "a", "--model", "nowhere"],
        ["encode", "--data", "scenes", "--out", "x", "--model", "nowhere"],
        ["data", "dedup", "--data", "scenes", "--out", "x", "--model", "nowhere"],
        ["train", "dvae", "--data", "nowhere", "--out", "x"],
        ["train", "clip", "--data", "nowhere", "--out", "x"],
        ["train", "dalle", "--data", "nowhere", "--out", "x"],
    ],
    ids=lambda args: " ".join(args[:2]),
)
@pytest.mark.parametrize("device", ["mps", "meta", "gpu", ""])
def test_a_device_that_is_not_there_is_noticed_first(args, device, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    option = "--train.device" if args[0] == "train" else "--device"
    assert cli.main([*args, option, device]) == 2
    said = capsys.readouterr().err
    assert said == f"dalle-fast: device: expected cpu or cuda, got {device!r}\n"
    assert not list(tmp_path.iterdir())


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"dalle-fast \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_an_output_that_cannot_be_written_is_noticed_first(tmp_path, monkeypatch, capsys):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pipeline.TextToImage, "load", None)  # it would be an error of another kind
    for out in ("folder.png", "file", "file/a.png"):
        assert cli.main(["generate", "a", "--out", str(tmp_path / out)]) == 2
        said = capsys.readouterr().err
        assert str(tmp_path / "file") in said or "got the folder" in said
    monkeypatch.setattr(Path, "touch", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    assert cli.main(["generate", "a", "--out", str(tmp_path / "b.png")]) == 2
    assert "output file: expected a folder that can be written" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_in_silence():
    process = subprocess.Popen(command("--version"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (0, 141)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("line\nand line"), KeyError("x"), RecursionError("deep")]
)
def test_an_error_that_no_command_expects_is_one_line(error, monkeypatch, capsys):
    def fail() -> None:
        """Fail."""
        raise error

    monkeypatch.setattr(cli, "info", fail)
    assert cli.main(["info"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dalle-fast: ") and said.count("\n") == 1


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
        (["generate"], "caption: expected at least one"),
        (["generate", "a", "--captions", "none.txt"], "none.txt"),
        (["generate", "a", "--model", ""], "model: expected a folder or a built-in name, got an empty one"),
        (["generate", "a", "--n", "0"], "n: expected 1 or more, got 0"),
        (["generate", "a", "--n", "4", "--top", "5"], "top: expected 1 to n = 4, got 5"),
        (["demo", "--steps", "0", "1", "1"], "steps: expected 1 or more, got 0 1 1"),
        (["demo", "--captions", "0"], "captions: expected 1 or more, got 0"),
        (["demo", "--pairs", "-1"], "pairs: expected 1 or more, got -1"),
        (
            ["train", "dvae", "--data", "scenes", "--out", "x", "--model.n-hid", "3"],
            "n_hid: expected groups of width 4",
        ),
        (
            ["train", "dvae", "--data", "scenes", "--out", "x", "--model.groups", "0"],
            "groups: expected an integer from 1",
        ),
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
