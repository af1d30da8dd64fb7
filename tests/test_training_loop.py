"""The training loop: a run that stops, for any reason, goes on bit by bit as if it had not."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pretend_cuda import pretended_cuda
from helpers.training import KINDS, checkpoint, records, same, settings, state_of, stop_after, task
from torch.overrides import TorchFunctionMode

import dalle_fast as df
from dalle_fast.models import load_model
from dalle_fast.ops import _library
from dalle_fast.training import TrainingDiverged, fit
from dalle_fast.training import loop as training_loop
from dalle_fast.training.loop import new_state, parameter_groups
from dalle_fast.training.metrics import Incidents, LossSpikes
from dalle_fast.training.state import places_of
from dalle_fast.training.stopping import stop_signals

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted_bitwise(kind, tmp_path):
    config = settings(kind)
    _, expected = fit(task(kind, config), config, tmp_path / "whole")
    # Ten samples in batches of four: step 4 is in the middle of an epoch.
    if kind == "clip":  # its cosine ends with the run, so the shorter run is one that was stopped
        stop_after(4, task(kind, config), config, tmp_path / "parts")
    else:
        fit(task(kind, replace(config, steps=4)), replace(config, steps=4), tmp_path / "parts")
    torch.rand(5)  # whatever happens in between
    model, metrics = fit(task(kind, config), config, tmp_path / "parts")
    assert same(state_of(tmp_path / "parts", kind), state_of(tmp_path / "whole", kind))
    assert {k: v for k, v in metrics.items() if k.startswith("val_")} == {
        k: v for k, v in expected.items() if k.startswith("val_")
    }
    exported = load_model(tmp_path / "whole" / f"{kind}.safetensors")
    assert same(dict(exported.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_saves(signum, tmp_path):
    config = settings("dvae")
    handler = signal.getsignal(signum)
    stopped = stop_after(4, task("dvae", config), config, tmp_path, signum)
    assert (stopped.signum, stopped.step) == (signum, 4)
    assert checkpoint(tmp_path, "dvae")["step"] == 4
    assert load_model(tmp_path / "dvae.safetensors", "dvae")
    assert signal.getsignal(signum) is handler
    fit(task("dvae", config), config, tmp_path)
    assert checkpoint(tmp_path, "dvae")["step"] == 7


def test_a_finished_run_is_left_as_it_is(tmp_path):
    config = settings("clip")
    model, metrics = fit(task("clip", config), config, tmp_path)
    log = (tmp_path / "clip" / "log.jsonl").read_text()
    again, metrics_again = fit(task("clip", config), config, tmp_path)
    assert same(dict(model.state_dict()), dict(again.state_dict()))
    assert metrics_again.items() <= metrics.items()
    assert (tmp_path / "clip" / "log.jsonl").read_text() == log


def test_without_resume_training_starts_anew(tmp_path):
    config = settings("dvae")
    fit(task("dvae", config), config, tmp_path)
    first = state_of(tmp_path, "dvae")
    fit(task("dvae", config), config, tmp_path, resume=False)
    assert same(state_of(tmp_path, "dvae"), first)
    assert [r["step"] for r in records(tmp_path, "dvae") if "loss" in r] == [2, 4, 6, 7]


# ---------------------------------------------------------------------------------------------- steps


def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path):
    config = settings("dvae", steps=4, log_every=1)
    broken = task("dvae", config)
    loss, seen = broken.loss, []

    def sometimes_infinite(model, batch, step):
        seen.append([p.detach().clone() for p in model.parameters()])
        value, metrics = loss(model, batch, step)
        return value * (float("nan") if step == 1 else 1.0), metrics

    broken.loss = sometimes_infinite
    fit(broken, config, tmp_path)
    assert not same(seen[0], seen[1])
    assert same(seen[1], seen[2])
    assert not same(seen[2], seen[3])
    lines = [record for record in records(tmp_path, "dvae") if "skipped_updates" in record]
    assert [record["skipped_updates"] for record in lines] == [0, 1, 1, 1]
    assert ["loss" in record for record in lines] == [True, False, True, True]
    assert checkpoint(tmp_path, "dvae")["skipped_updates"] == 1


def test_the_log_names_resblocks_whose_gradients_are_not_finite(tmp_path):
    config = settings("dalle", steps=4, log_every=2)
    broken = task("dalle", config)
    loss = broken.loss

    def overflow(model, batch, step):
        value, metrics = loss(model, batch, step)
        weight = model.layers[1].mlp[0].weight
        return value + (weight.sum() * 1e30 * 1e30 if step == 2 else 0.0), metrics

    broken.loss = overflow
    fit(broken, config, tmp_path)
    lines = [record for record in records(tmp_path, "dalle") if "skipped_updates" in record]
    assert "nonfinite" not in lines[0]
    assert lines[1]["nonfinite"] == {"layers.1.mlp": 1}
    assert not any("loss_spikes" in record for record in lines)


def test_a_sudden_rise_of_the_loss_is_a_spike():
    random = np.random.default_rng(0)
    falling = [5 - i / 2000 + random.normal(0, 0.1) for i in range(500)]
    spikes, young = LossSpikes(), LossSpikes()
    assert not any(spikes.update(loss) for loss in falling)
    resumed = LossSpikes(**json.loads(json.dumps(asdict(spikes))))
    assert spikes.update(falling[-1] + 1)
    assert not resumed.update(falling[-1] - 1)  # downwards is none
    assert resumed.update(falling[-1] + 1)
    assert not any(young.update(loss) for loss in (1.0, 1.0, 100.0))  # too early to tell


def test_incidents_are_told_once():
    incidents = Incidents()
    assert incidents.result() == {}
    incidents.add_spike(7)
    incidents.add_nonfinite(["layers.3.mlp", "layers.3.mlp"])  # of two parameters
    incidents.add_nonfinite(["layers.3.mlp", "start"])
    assert incidents.result() == {"loss_spikes": [7], "nonfinite": {"layers.3.mlp": 2, "start": 1}}
    assert incidents.result() == {}


@pytest.mark.parametrize(
    ("kind", "parameter", "place"),
    [
        ("dalle", "layers.1.attn.qkv.weight", "layers.1.attn"),
        ("dalle", "layers.1.attn_norm.bias", "layers.1.attn_norm"),
        ("clip", "visual.transformer.resblocks.0.mlp.c_fc.weight", "visual.transformer.resblocks.0"),
        ("dvae", "encoder.blocks.group_2.block_1.res_path.conv_1.w", "encoder.blocks.group_2.block_1"),
        ("dalle", "text_embedding.weight", "text_embedding"),
        ("dalle", "start", "start"),
    ],
)
def test_the_place_of_a_parameter_is_its_resblock_or_its_module(kind, parameter, place):
    assert places_of(task(kind, settings(kind)).model)[parameter] == place


def test_training_that_has_diverged_ends(tmp_path):
    config = settings("dvae", steps=200)
    broken = task("dvae", config)
    loss = broken.loss
    broken.loss = lambda model, batch, step: (loss(model, batch, step)[0] * float("inf"), {})
    with pytest.raises(TrainingDiverged, match="none in 100 steps"):
        fit(broken, config, tmp_path)


class ReadLists(TorchFunctionMode):
    """Counts ``tolist`` of tensors on the device."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.Tensor.tolist and args[0].device.type == "cuda"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def cuda(monkeypatch):
    """A pretended device with kernels, and a context in which it raises an error at any wait but ``tolist``."""
    kernels = frozenset(vars(df.reference)) - {"pack_linear", "packed_linear"}
    monkeypatch.setattr(_library, "_BACKEND", _library.Backend(("cpu", "cuda"), {}, cuda_ops=kernels))
    with pretended_cuda(monkeypatch):
        yield lambda: torch.cuda.graph(torch.cuda.CUDAGraph())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_the_device_once(kind, cuda, monkeypatch):
    config = settings(kind, device="cuda", ema_every=100)
    some = task(kind, config)
    state, batches = new_state(some.model, config, some.scales), some.batches(0)
    monkeypatch.setattr(state.optimizer, "step", lambda **_: None)  # test_optimizer.py: it reads nothing
    for _ in range(3):
        batch = training_loop.to_device(next(batches), torch.device("cuda"))
        with ReadLists() as lists, cuda():
            finite, _ = training_loop.train_step(state, some, batch, 1e-3, config)
        assert finite and lists.count == 1
        state.step += 1


def test_the_transformer_reads_no_values_on_the_device_but_in_generate(cuda):
    model = task("dalle", settings("dalle")).model.to("cuda")
    text, codes = (torch.zeros(shape, dtype=torch.int64, device="cuda") for shape in ((2, 6), (2, 4, 4)))
    with ReadLists() as lists, cuda():
        model(text, codes)
        model.prefill(text, 3)
    assert lists.count == 0
    with pytest.raises(ValueError, match=r"text_tokens: expected values in \[0, 276\), got 276 to 276"):
        model.generate(text + 276, 1)


def test_the_gradient_is_clipped(tmp_path):
    config = settings("clip", steps=1, clip_norm=1e-3, weight_decay=0.0)
    one = task("clip", config)
    state = new_state(one.model, config)
    batch = next(one.batches(0))
    seen = []
    state.optimizer.register_step_pre_hook(
        lambda optimizer, args, options: seen.append([p.grad * options["clip"] for p in one.model.parameters()])
    )
    finite, metrics = training_loop.train_step(state, one, batch, 1e-3, config)
    assert finite
    assert metrics["grad_norm"] > 1e-2  # the log shows it as it was
    assert torch.nn.utils.get_total_norm(seen[0]).item() == pytest.approx(1e-3, rel=1e-3)


def test_the_matrices_of_resblocks_have_16_bit_moments():
    def in_16_bits(**changes) -> set[str]:
        config = settings("dalle", **changes)
        model = task("dalle", config).model
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = parameter_groups(model, config)
        return {names[id(p)] for group in groups if group["moments"] == "16-bit" for p in group["params"]}

    matrices = ("attn.qkv.weight", "attn.out.weight", "mlp.0.weight", "mlp.2.weight")
    assert in_16_bits() == {f"layers.{i}.{name}" for i in range(2) for name in matrices}
    assert in_16_bits(moments="float32") == set()


def test_other_moments_than_those_of_the_checkpoint_are_refused(tmp_path):
    config = settings("dalle", steps=1)
    fit(task("dalle", config), config, tmp_path)
    other = replace(config, moments="float32")
    with pytest.raises(
        ValueError, match=r"expected moments=\['float32', 'float32'\], got moments=\['float32', '16-bit', 'float32'\]"
    ):
        fit(task("dalle", other), other, tmp_path)


def final_loss(moments: str, seed: int, steps: int = 100) -> float:
    """Mean training loss of the last 30 steps of a transformer that learns ten images by heart."""
    config = settings("dalle", moments=moments, seed=seed, lr=3e-3, caption_dropout=0.0, plateau_patience=10**6)
    some = task("dalle", config)
    state, batches, losses = new_state(some.model, config), some.batches(0), []
    for step in range(steps):
        _, metrics = training_loop.train_step(state, some, next(batches), config.lr, config)
        state.step = step + 1
        losses.append(metrics["loss"])
    return torch.stack(losses[-30:]).mean().item()


def test_a_model_learns_as_with_float32_moments():
    seeds = (0, 1, 2)
    half, full = (torch.tensor([final_loss(moments, seed) for seed in seeds]) for moments in ("16-bit", "float32"))
    noise = full.max() - full.min()
    assert full.max() < 2.0  # of 2.8 at first: something is learnt
    assert not torch.equal(half, full)
    assert (half - full).abs().max() < noise / 10


@pytest.mark.parametrize("kind", KINDS)
def test_gains_biases_and_embeddings_do_not_decay(kind):
    config = settings(kind, weight_decay=0.3)
    model = task(kind, config).model
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {names[id(p)]: g["weight_decay"] > 0 for g in parameter_groups(model, config) for p in g["params"]}
    assert decays.keys() == set(names.values())
    for name, decay in decays.items():
        exempt = name.endswith(("bias", ".b")) or "embedding" in name or "position" in name
        assert decay == (not exempt and model.get_parameter(name).ndim > 1), name
    assert any(decays.values())
    if kind == "dvae":
        shares = {names[id(p)]: g["lr_share"] for g in parameter_groups(model, config) for p in g["params"]}
        assert {name.split(".")[0]: share for name, share in shares.items()} == {"encoder": 0.5, "decoder": 1.0}


def test_the_step_size_follows_the_schedule_and_the_plateau(tmp_path):
    config = settings("dalle", steps=8, log_every=1, lr=1e-30, warmup_steps=2)  # nothing is learnt: a plateau
    fit(task("dalle", config), config, tmp_path)
    rates = [record["lr"] for record in records(tmp_path, "dalle") if "lr" in record]
    assert rates[:2] == [0.5e-30, 1e-30]
    halvings = checkpoint(tmp_path, "dalle")["plateau"]["halvings"]
    assert halvings >= 1
    assert min(rates) >= 1e-30 * 0.5**halvings
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)


# ---------------------------------------------------------------------------------------------- signals to the group

GROUP = """
import sys
from pathlib import Path
from helpers.training import settings, task
from dalle_fast.training import TrainingStopped, fit

config = settings("clip", steps=100_000, save_every=100_000, val_every=100_000, log_every=1, workers=2)
try:
    fit(task("clip", config), config, Path(sys.argv[1]))
except TrainingStopped as stopped:
    sys.exit(128 + stopped.signum)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_group_with_data_workers_saves(signum, tmp_path):
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", GROUP, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "clip" / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signum, errors
    assert "Traceback" not in errors
    assert checkpoint(tmp_path, "clip")["step"] >= 4
    with pytest.raises(ProcessLookupError):  # the workers have ended, too
        os.killpg(process.pid, 0)


def test_under_nohup_a_closed_terminal_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)
