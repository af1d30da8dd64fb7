"""The log of a training: its records, what a resume drops, and damaged lines."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.training import records, same, settings, task
from torch import nn

from dalle_fast.figures import plot_logs
from dalle_fast.training import fit
from dalle_fast.training.metrics import Log, perplexity

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_log_has_what_a_newcomer_looks_for(tmp_path):
    config = settings("dvae")
    _, metrics = fit(task("dvae", config), config, tmp_path)
    lines = records(tmp_path, "dvae")
    assert [r["step"] for r in lines if "loss" in r] == [2, 4, 6, 7]
    assert [r["step"] for r in lines if "val_loss" in r] == [3, 6, 7]
    training, validation = lines[-2], lines[-1]
    assert {
        "loss",
        "nll",
        "kl",
        "mse",
        "grad_norm",
        "lr",
        "codes_used",
        "code_perplexity",
        "seconds",
    } <= training.keys()
    assert {"val_loss", "val_nll", "val_mse", "val_codes_used", "val_code_perplexity"} <= validation.keys()
    assert 1 <= training["code_perplexity"] <= training["codes_used"] <= 16
    assert metrics == {k: v for r in (training, validation) for k, v in r.items() if k != "step"}
    assert (tmp_path / "dvae" / "skipped.jsonl").exists()


def test_a_resumed_log_drops_what_will_be_written_again(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo')
    with Log(path, step=2) as log:
        log.write(3, {"loss": float("nan"), "lr": 0.5})
        log.write(3, {})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 3}, {"step": 2, "loss": 2}, {"step": 3, "loss": None, "lr": 0.5},
    ]  # fmt: skip


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    with Log(tmp_path / "log.jsonl", step=4, tensorboard=True) as log:
        log.write(5, {"loss": 0.5})
    assert written == [(tmp_path / "tensorboard", 5), ("loss", 0.5, 5), "closed"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        Log(tmp_path / "log.jsonl", step=4, tensorboard=True)


def test_perplexity_counts_the_codes_that_matter():
    assert perplexity(torch.tensor([5, 0, 0, 0])) == pytest.approx(1.0)
    assert perplexity(torch.tensor([5, 5, 5, 5])) == pytest.approx(4.0)
    assert 1.0 < perplexity(torch.tensor([9, 1, 0, 0])) < 2.0


def test_the_random_start_is_the_seeds_alone():
    torch.manual_seed(1)
    first = task("clip", settings("clip")).model
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)  # the caller's generator is untouched
    second = task("clip", settings("clip")).model
    assert isinstance(first, nn.Module)
    assert same(dict(first.state_dict()), dict(second.state_dict()))
    other = task("clip", settings("clip", seed=9)).model
    assert not same(dict(first.state_dict()), dict(other.state_dict()))


def test_lines_that_are_no_records_are_dropped_and_counted(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    good = [{"step": 1, "loss": 3.5, "log2_scales": [1.0, 2]}, {"step": 2, "loss": None, "nonfinite": {"start": 1}}]
    bad = [
        b"\xff{}",
        b'{"step": null}',
        b'{"step": "x"}',
        b"[" * 200_000,
        b'{"step": 1, "loss": "x"}',
        b"7",
        b"{",
        b"\x00",
    ]
    bad += [
        b'{"step": 1, "loss": NaN}',
        b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
        b'{"step": true}',
        b'{"loss": 1}',
    ]
    bad += [
        b'{"step": 1, "log2_scales": ["a"]}',
        b'{"step": 1, "log2_scales": [[1]]}',
        b'{"a":' * 100_000,
        b'{"loss": 1}',
        b"\x00",
    ]
    lines = [json.dumps(record).encode() for record in good]
    path.write_bytes(b"\n".join([bad[0], lines[0], *bad[1:], lines[1], b'{"step": 3, "loss": 1}', b'{"step": 4, "lo']))
    with Log(path, step=2) as log:
        log.write(3, {"loss": 2.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [*good, {"step": 3, "loss": 2.0}]
    assert capsys.readouterr().err == f"{path}: {len(bad) + 1} damaged lines dropped\n"


def test_a_damaged_log_is_plotted(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "dalle").mkdir()
    log = tmp_path / "dalle" / "log.jsonl"
    log.write_bytes(
        b'{"step": 1, "loss": 1, "log2_scales": [1, 2]}\n\xff\n{"step": 2, "loss": [1]}\n{"step": "a", "loss": 2}\n'
        b'{"step": 3, "log2_scales": 7}\n{"step": 4, "log2_scales": [1]}\n'
        b'{"step": 5, "loss": 2, "log2_scales": [1, 2]}\n'
    )
    assert [path.name for path in plot_logs(tmp_path)] == ["losses.png", "scales.png"]
    assert "log.jsonl: 2 damaged lines dropped" in capsys.readouterr().err
