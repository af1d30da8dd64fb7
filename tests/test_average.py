"""The running average: its values, its exchange with the parameters, and copies that arrive late, as on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from helpers.training import KINDS, checkpoint, part, same, settings, task
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

from dalle_fast.training import average as module
from dalle_fast.training import fit
from dalle_fast.training.average import HostCopy, RunningAverage
from dalle_fast.training.loop import new_state, train_step


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Linear(5, 2))


def copy_of(tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in dict(tensors).items()}


def train(some: nn.Module) -> None:
    """Anything that changes the parameters."""
    with torch.no_grad():
        for parameter in some.parameters():
            parameter.add_(torch.randn_like(parameter))


class LateCopy(HostCopy):
    """Copies at the last moment that CUDA may choose: a copy that nobody has waited for has not happened."""

    started = False

    def start(self) -> None:
        self.started = True

    def hold_back_device(self) -> None:
        if self.started:
            super().start()
        self.started = False

    def wait(self) -> list[torch.Tensor]:
        self.hold_back_device()
        return super().wait()


class LateThread:
    """Runs a function when its result is asked for."""

    def __init__(self, *_) -> None:
        pass

    def submit(self, function, *args):
        self.result = lambda: function(*args)
        return self


@pytest.fixture
def late(monkeypatch):
    """Averages are those of a device that copies late."""
    monkeypatch.setattr(module, "host_copy_of", LateCopy)
    monkeypatch.setattr(module, "ThreadPoolExecutor", LateThread)


# ---------------------------------------------------------------------------------------------- numbers


def simulated(decay: float, values: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The average in float64 of the parameters at the start and at each update."""
    average = {name: value.double() for name, value in values[0].items()}
    for count, value in enumerate(values[1:], 1):
        kept = min(decay, count / (9 + count))
        average = {name: kept * average[name] + (1 - kept) * value[name].double() for name in average}
    return average


@pytest.mark.parametrize("staged", [False, True])
def test_it_is_the_weighted_mean_of_earlier_parameters(staged, monkeypatch):
    if staged:  # as on CUDA, with the thread
        monkeypatch.setattr(module, "host_copy_of", HostCopy)
    some = model()
    average = RunningAverage(some, decay=0.9)
    values = [copy_of(some.named_parameters())]
    for count in range(1, 151):  # the decay reaches 0.9 at 81
        average.keep_parameters()
        train(some)
        values.append(copy_of(some.named_parameters()))
        average.update(count)
    expected = simulated(0.9, values)
    assert average.tensors().keys() == expected.keys() == some.state_dict().keys()
    for name, value in average.tensors().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_it_starts_at_the_parameters_and_early_updates_weigh_more():
    some = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(some.weight)
    early, late = RunningAverage(some, decay=0.99), RunningAverage(some, decay=0.99)
    assert early.tensors()["weight"].item() == 0.0
    nn.init.ones_(some.weight)
    early.update(1)
    late.update(10**6)
    assert early.tensors()["weight"].item() == pytest.approx(0.9)
    assert late.tensors()["weight"].item() == pytest.approx(0.01)


def test_it_is_laid_out_as_the_parameters():
    some = model()
    for average, parameter in zip(RunningAverage(some, 0.9).tensors().values(), some.parameters(), strict=True):
        assert average.stride() == parameter.stride()
        assert average.data_ptr() != parameter.data_ptr()


def test_what_the_thread_raises_is_raised_by_whoever_waits(monkeypatch):
    monkeypatch.setattr(module, "host_copy_of", HostCopy)
    monkeypatch.setattr(HostCopy, "wait", lambda _: 1 / 0)
    average = RunningAverage(model(), 0.9)
    average.update(1)
    with pytest.raises(ZeroDivisionError):
        average.tensors()
    assert average.tensors()


def test_of_sharded_parameters_it_is_that_of_the_local_shards():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        some, whole = model(), model()
        distribute_module(some, init_device_mesh("cpu", (1,)), shard_first_dimension)
        averages = [RunningAverage(each, 0.9) for each in (some, whole)]
        for each, average in zip((some, whole), averages, strict=True):
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter.mul_(3)
            average.update(1)
        assert same(*(dict(average.tensors()) for average in averages))
        with averages[0].in_model(), averages[1].in_model():
            sharded = {name: parameter.full_tensor() for name, parameter in some.named_parameters()}
            assert same(copy_of(sharded), copy_of(whole.named_parameters()))
    finally:
        dist.destroy_process_group()


def shard_first_dimension(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for key, parameter in list(module.named_parameters(recurse=False)):
        module.register_parameter(key, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))


# ---------------------------------------------------------------------------------------------- in the model


def test_in_the_model_it_takes_the_place_of_the_parameters():
    some = model().train()
    average = RunningAverage(some, 0.9)
    train(some)
    average.update(1)
    parameters, averages = copy_of(some.named_parameters()), copy_of(average.tensors())
    addresses = [parameter.data_ptr() for parameter in some.parameters()]
    with average.in_model() as averaged:
        assert averaged is some
        assert not averaged.training
        assert same(copy_of(averaged.named_parameters()), averages)
    assert some.training
    assert same(copy_of(some.named_parameters()), parameters)
    assert same(copy_of(average.tensors()), averages)
    assert [parameter.data_ptr() for parameter in some.parameters()] == addresses
    some.eval()
    with pytest.raises(RuntimeError, match="of the validation"), average.in_model():
        raise RuntimeError("of the validation")
    assert not some.training
    assert same(copy_of(some.named_parameters()), parameters)
    assert same(copy_of(average.tensors()), averages)


# ---------------------------------------------------------------------------------------------- late copies


def test_the_double_is_late(late):
    """A loop that does not keep the parameters averages later ones."""
    some = model()
    average = RunningAverage(some, decay=0.0)
    for keep in (True, False):
        parameters = copy_of(some.named_parameters())
        average.update(10**6)
        if keep:
            average.keep_parameters()
        train(some)
        assert same(copy_of(average.tensors()), parameters) == keep


@pytest.mark.parametrize("kind", KINDS)
def test_late_copies_change_nothing(kind, tmp_path, request):
    config = settings(kind)
    fit(task(kind, config), config, tmp_path / "in place")
    request.getfixturevalue("late")
    model, _ = fit(task(kind, config), config, tmp_path / "late")
    expected, content = checkpoint(tmp_path / "in place", kind), checkpoint(tmp_path / "late", kind)
    assert same(part(content, "average"), part(expected, "average"))
    assert same(part(content, "average"), dict(model.state_dict()))
    assert same(part(content, "model"), part(expected, "model"))


def test_a_save_has_the_update_that_was_under_way(late, tmp_path):
    config = settings("dvae", steps=6, ema_every=2, save_every=4, keep_checkpoints=5)
    fit(task("dvae", config), config, tmp_path / "whole")
    short = settings("dvae", steps=4, ema_every=2)
    fit(task("dvae", short), short, tmp_path / "parts")
    fit(task("dvae", config), config, tmp_path / "parts")
    whole, parts = (checkpoint(tmp_path / name, "dvae") for name in ("whole", "parts"))
    assert same(part(whole, "average"), part(parts, "average"))


# ---------------------------------------------------------------------------------------------- in training


def test_it_moves_every_few_updates_and_is_what_is_exported(tmp_path):
    config = settings("dvae", steps=3, ema_every=2)
    model, _ = fit(task("dvae", config), config, tmp_path)
    content = checkpoint(tmp_path, "dvae")
    assert same(part(content, "average"), dict(model.state_dict()))
    assert not same(part(content, "average"), part(content, "model"))
    never = settings("dvae", steps=3, ema_every=4)
    start = task("dvae", never).model.state_dict()
    model, _ = fit(task("dvae", never), never, tmp_path / "never")
    assert same(dict(model.state_dict()), dict(start))


def test_training_returns_the_average_in_eval_mode_on_the_cpu(tmp_path):
    config = settings("clip", steps=1)
    model, _ = fit(task("clip", config), config, tmp_path)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_step_of_the_loop_updates_the_average():
    config = settings("dalle", ema_every=1, ema_decay=0.5)
    some = task("dalle", config)
    state = new_state(some.model, config)
    values, batches = [copy_of(some.model.named_parameters())], some.batches(0)
    for step in range(5):
        train_step(state, some, next(batches), 1e-2, config)
        state.step = step + 1
        values.append(copy_of(some.model.named_parameters()))
    for name, value in simulated(0.5, values).items():
        torch.testing.assert_close(state.average.tensors()[name].double(), value, rtol=1e-5, atol=1e-6)
