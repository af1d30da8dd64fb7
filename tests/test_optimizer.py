"""AdamW16: the kernel for moments of 16 bits, torch's for float32, and its states."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers.training import same
from torch.utils._python_dispatch import TorchDispatchMode

import dalle_fast as df
from dalle_fast import minifloat

ADAMW = {"lr": 1e-2, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(3, 4), (5,), (2, 3, 4)]


@pytest.fixture(autouse=True)
def everything_on(device):
    """Every tensor of a test is made on the device."""
    with device:
        yield


def parameters(seed: int = 0, shapes: list[tuple[int, ...]] = SHAPES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]
    return [x.to(torch.get_default_device()).requires_grad_() for x in drawn]


def set_gradients(params: list[torch.Tensor], seed: int) -> None:
    for p, grad in zip(params, parameters(1000 + seed, [tuple(p.shape) for p in params]), strict=True):
        p.grad = grad.detach().clone()


def values(params: list[torch.Tensor]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def two_groups(params: list[torch.Tensor]) -> list[dict]:
    """The last parameter in float32, the others in 16 bits."""
    return [{"params": params[:-1]}, {"params": params[-1:], "moments": "float32", "weight_decay": 0.0}]


# ---------------------------------------------------------------------------------------------- both kinds of moments


def test_moments_of_16_bits_are_those_of_the_op():
    ours, theirs = parameters(), parameters()
    optimizer = df.AdamW16(ours, **ADAMW)
    means, variances = ([torch.zeros(shape, dtype=torch.int16) for shape in SHAPES] for _ in range(2))
    clip, unscale = torch.tensor(0.5), torch.tensor([1.0, 0.25, 2.0])
    for step in range(1, 6):
        set_gradients(ours, step)
        optimizer.step(unscale=unscale, clip=clip)
        grads = [p.grad for p in ours]
        df.adamw16(theirs, grads, means, variances, step, 1e-2, 0.9, 0.96, 1e-8, 0.1, unscale=unscale, clip=clip)
    assert same(values(ours), values(theirs))
    state = optimizer.state_dict()
    assert state["param_groups"][0]["step"] == 5
    assert same([state["state"][i]["exp_avg"] for i in range(3)], means)
    assert same([state["state"][i]["exp_avg_sq"] for i in range(3)], variances)
    assert minifloat.decode(variances[0], "0-6-10").max() <= 5


def test_moments_of_32_bits_are_torchs_to_the_bit():
    ours, theirs = parameters(), parameters()
    optimizer = df.AdamW16(ours, **ADAMW, moments="float32")
    torchs = torch.optim.AdamW(theirs, **ADAMW, fused=True)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        torchs.step()
    assert same(values(ours), values(theirs))
    assert same(optimizer.state_dict()["state"], torchs.state_dict()["state"])


def test_the_variance_is_clipped_in_16_bits_alone():
    params = parameters()
    optimizer = df.AdamW16(two_groups(params), **ADAMW)
    for p in params:
        p.grad = torch.full_like(p, 1e3)
    optimizer.step()
    assert minifloat.decode(optimizer.state[params[0]]["exp_avg_sq"], "0-6-10").eq(5).all()
    assert optimizer.state[params[2]]["exp_avg_sq"].allclose(torch.tensor(4e4))


def test_each_gradient_has_its_factor():
    """As if it had been multiplied before."""
    factors = [0.5, 0.125, 2.0]
    ours, theirs = parameters(), parameters()
    optimizers = [df.AdamW16(two_groups(params), **ADAMW) for params in (ours, theirs)]
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for p, factor in zip(theirs, factors, strict=True):
            p.grad *= factor
        optimizers[0].step(unscale=torch.tensor(factors) * 4, clip=torch.tensor([0.25]))
        optimizers[1].step()
    assert same(values(ours), values(theirs))
    assert same(optimizers[0].state_dict()["state"], optimizers[1].state_dict()["state"])


def test_one_factor_for_all():
    ours, theirs = parameters(), parameters()
    optimizers = [df.AdamW16(two_groups(params), **ADAMW) for params in (ours, theirs)]
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizers[0].step(clip=torch.tensor(0.25))
        optimizers[1].step(unscale=torch.full((3,), 0.25))
    assert same(values(ours), values(theirs))


def test_the_norm_of_all_gradients_is_clipped():
    params = parameters()
    optimizer = df.AdamW16(two_groups(params), **{**ADAMW, "betas": (0.0, 0.96)})  # the mean is the gradient
    set_gradients(params, 0)
    norm, skip = df.gradient_norm([p.grad for p in params])
    assert norm > 1
    optimizer.step(clip=(0.01 / norm).clamp(max=1), skip=skip)
    moments = [optimizer.state[p]["exp_avg"] for p in params]
    means = [*(minifloat.decode(mean, "1-6-9") for mean in moments[:2]), moments[2]]
    assert torch.nn.utils.get_total_norm(means).item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_a_skipped_parameter_stays_as_it_is(skipped):
    """It and its moments, bit by bit; the others are updated as if it were not there."""
    ours, theirs = parameters(), parameters()
    optimizers = [df.AdamW16(two_groups(params), **ADAMW) for params in (ours, theirs)]
    for step in range(3):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            set_gradients(params, step)
            optimizer.step()
    before = values(ours)[skipped], copy.deepcopy(optimizers[0].state[ours[skipped]])
    for params in (ours, theirs):
        set_gradients(params, 3)
    ours[skipped].grad.view(-1)[0] = float("nan")
    theirs[skipped].grad = None
    optimizers[0].step(skip=df.gradient_norm([p.grad for p in ours])[1])
    optimizers[1].step()
    assert same(values(ours), values(theirs))
    assert same(before, (values(ours)[skipped], optimizers[0].state[ours[skipped]]))
    assert same(optimizers[0].state_dict()["state"], optimizers[1].state_dict()["state"])


def test_an_update_that_is_skipped_does_not_count():
    params = parameters()
    optimizer = df.AdamW16(two_groups(params), **ADAMW)
    before = values(params)
    set_gradients(params, 0)
    optimizer.step(skip=torch.ones((), dtype=torch.bool).expand(3))
    assert same(values(params), before)
    assert optimizer.param_groups[0]["step"] == 0
    assert optimizer.state[params[2]]["step"] == 0
    fresh = parameters()
    df_optimizer = df.AdamW16(two_groups(fresh), **ADAMW)
    set_gradients(fresh, 0)
    df_optimizer.step()
    optimizer.step()
    assert same(values(params), values(fresh))


def test_parameters_without_a_gradient_are_left_alone():
    params = parameters()
    optimizer = df.AdamW16(two_groups(params), **ADAMW)
    before = values(params)
    optimizer.step(clip=torch.tensor(1.0))
    assert same(values(params), before)
    params[1].grad = torch.ones(5)
    optimizer.step(unscale=torch.ones(1))
    assert [torch.equal(p, old) for p, old in zip(params, before, strict=True)] == [True, False, True]
    assert list(optimizer.state) == [params[1]]


def test_a_closure_computes_the_gradients():
    params = parameters()
    optimizer = df.AdamW16(params, **ADAMW)

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses == sorted(losses, reverse=True)


def test_nothing_is_read_on_the_host():
    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    params = parameters()
    optimizer = df.AdamW16(two_groups(params), **ADAMW)
    set_gradients(params, 0)
    with NoReading():
        norm, skip = df.gradient_norm([p.grad for p in params])
        optimizer.step(unscale=torch.ones(3), clip=(1 / norm).clamp(max=1), skip=skip)
        optimizer.step(clip=(1 / norm).clamp(max=1))
    with pytest.raises(AssertionError), NoReading():
        norm.item()


# ---------------------------------------------------------------------------------------------- states


def test_a_state_comes_back_from_a_file():
    """Through a checkpoint read as mere weights; what follows is the same to the bit."""
    ours = parameters()
    ours[2] = ours[2].detach()[None].contiguous(memory_format=torch.channels_last).requires_grad_()
    groups = [{"params": ours[::2]}, {"params": ours[1:2], "moments": "float32"}]
    optimizer = df.AdamW16(groups, **ADAMW)
    for step in range(3):
        set_gradients(ours, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    content = torch.load(file, weights_only=True)
    assert [state["exp_avg"].dtype for state in content["state"].values()] == [torch.int16, torch.int16, torch.float32]

    theirs = [p.detach().clone().requires_grad_() for p in ours]
    groups = [{"params": theirs[::2]}, {"params": theirs[1:2], "moments": "float32"}]
    restored = df.AdamW16(groups, lr=1.0)
    restored.load_state_dict(content)
    assert same(restored.state_dict(), optimizer.state_dict())
    for step in range(3, 6):
        for params, one in ((ours, optimizer), (theirs, restored)):
            set_gradients(params, step)
            one.step()
    assert same(values(ours), values(theirs))
    assert same(restored.state_dict(), optimizer.state_dict())


def test_every_code_survives_a_load():
    [p] = parameters(shapes=[(65536,)])
    optimizer = df.AdamW16([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    codes = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    optimizer.state[p] = {"exp_avg": codes, "exp_avg_sq": codes.flip(0)}
    [twin] = parameters(shapes=[(65536,)])
    restored = df.AdamW16([twin])
    restored.load_state_dict(optimizer.state_dict())
    assert same(restored.state[twin], optimizer.state[p])


def test_a_state_before_the_first_update():
    optimizer = df.AdamW16(parameters())
    optimizer.load_state_dict(df.AdamW16(parameters()).state_dict())
    assert not optimizer.state


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"moments": "8-bit"}, ValueError, "moments: expected one of 16-bit, float32, got 8-bit"),
        ({"lr": -1.0}, ValueError, "lr: expected a number of at least 0, got -1.0"),
        ({"eps": float("nan")}, ValueError, "eps: expected a number of at least 0, got nan"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay: expected a number of at least 0, got -0.1"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas: expected two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        df.AdamW16(parameters(), **options)
    with pytest.raises(error, match=message):
        df.AdamW16([{"params": parameters(), **options}])


def test_bad_input():
    with pytest.raises(TypeError, match=r"params: expected torch.float32, got torch.float16"):
        df.AdamW16([torch.zeros(2, dtype=torch.float16)])
    params = parameters()
    optimizer = df.AdamW16(two_groups(params), **ADAMW)
    set_gradients(params, 0)
    with pytest.raises(ValueError, match=r"unscale: expected 3 element\(s\), got \[2\]"):
        optimizer.step(unscale=torch.ones(2))
    with pytest.raises(ValueError, match=r"clip: expected 1 element\(s\), got \[3\]"):
        optimizer.step(clip=torch.ones(3))
    with pytest.raises(TypeError, match=r"skip: expected torch.bool, got torch.float32"):
        optimizer.step(skip=torch.ones(3))
    with pytest.raises(ValueError, match=r"moments: expected groups with \['16-bit', 'float32'\], got \['16-bit'\]"):
        optimizer.load_state_dict(df.AdamW16(parameters()).state_dict())
