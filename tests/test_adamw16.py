"""AdamW on moments stored in the 16-bit formats of appendix D, and the norm of its gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICES
from helpers.op_checks import assert_equal, is_nan_around, normal, same_on_any_number_of_threads, surrounded_in_memory
from hypothesis import given, settings
from hypothesis import strategies as st

import dalle_fast as df
from dalle_fast import reference
from dalle_fast.minifloat import decode, encode

ADAMW = {"lr": 4.5e-4, "beta1": 0.9, "beta2": 0.96, "eps": 1e-8, "weight_decay": 4.5e-2}


def bits(code: torch.Tensor) -> torch.Tensor:
    """A moment's int16 bit pattern as a code in [0, 65536)."""
    return code.to(torch.int32) & 0xFFFF


def adamw16_one(param, grad, mean, variance, step, op=df.adamw16, **options):
    op([param], [grad], [mean], [variance], step, **{**ADAMW, **options})


def start(shape, seed=0, device="cpu"):
    """A generator on the CPU, a parameter and its moments."""
    generator = torch.Generator().manual_seed(seed)
    param = torch.randn(shape, generator=generator).to(device)
    moments = torch.zeros(2, *param.shape, dtype=torch.int16, device=device)
    return generator, param, *moments.unbind()


def start_many(shapes, device):
    """Parameters, gradients, means and variances in the midst of training."""

    def draw(seed):
        return [normal(*shape, seed=seed + i, device=device) for i, shape in enumerate(shapes)]

    means = [encode(0.1 * x, "1-6-9").view(torch.int16) for x in draw(20_000)]
    variances = [encode((0.1 * x).square(), "0-6-10").view(torch.int16) for x in draw(30_000)]
    return draw(0), draw(10_000), means, variances


def copies(lists):
    return [[tensor.clone() for tensor in tensors] for tensors in lists]


def assert_same_state(ours, theirs):
    """Parameters to float32 rounding; moments to one code, because the products may be fused or not."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-7)
    for mine, wanted in zip(ours[1:], theirs[1:], strict=True):
        distance = (bits(mine) - bits(wanted)).abs()
        assert (distance <= 1).all()
        assert (distance > 0).sum() <= 0.01 * distance.numel() + 1


def test_several_steps_match_the_reference(device):
    generator, *ours = start((50, 77), device=device)
    for step in range(1, 9):
        grad = torch.randn(50, 77, generator=generator).to(device) * 10.0 ** (step - 5)
        theirs = [tensor.clone() for tensor in ours]
        adamw16_one(ours[0], grad, *ours[1:], step)
        adamw16_one(theirs[0], grad, *theirs[1:], step, df.reference.adamw16)
        assert_same_state(ours, theirs)


def test_follows_torch_adamw(device):
    """AdamW within the precision of the formats, on a quadratic loss."""
    _, param, mean, variance = start(1000, device=device)
    param.clamp_(-2, 2)  # squares above 5 are clipped, which torch does not do
    twin = param.clone().requires_grad_()
    hyper = {"lr": 1e-2, "weight_decay": 0.01, "eps": 1e-8}
    torch_adamw = torch.optim.AdamW([twin], betas=(0.9, 0.96), **hyper)
    for step in range(1, 41):
        adamw16_one(param, param.clone(), mean, variance, step, **hyper)
        twin.grad = twin.detach().clone()
        torch_adamw.step()
    assert (param - twin).abs().max() < 2e-3  # after moving by 0.4


def test_variance_is_clipped(device):
    _, param, mean, variance = start(3, device=device)
    adamw16_one(param, torch.full_like(param, 1e3), mean, variance, 1)
    assert decode(variance, "0-6-10").tolist() == [5.0] * 3
    assert decode(mean, "1-6-9").tolist() == [15.984375] * 3


SHAPES = [(3,), (0, 4), (7, 300), (), (2048,), (33, 65), (1,), (5, 0)]


def test_many_parameters_at_once(device):
    """Each as if it were alone, with its own options; options that change from step to step are tensors, too."""
    ours = start_many(SHAPES, device)
    together = copies(ours)
    n = len(SHAPES)
    unscale = torch.tensor([2.0**-i for i in range(n)], device=device)
    weight_decay = torch.linspace(0, 0.5, n, device=device)
    clip = torch.tensor(0.75, device=device)
    skip = torch.tensor([i == 2 for i in range(n)], device=device)
    options = {**ADAMW, "lr": torch.tensor(4.5e-4, device=device)}
    df.adamw16(*together, torch.tensor(3, device=device), **{**options, "weight_decay": weight_decay}, unscale=unscale,
               clip=clip, skip=skip)  # fmt: skip
    for i in range(n):
        param, grad, mean, variance = (tensors[i].clone() for tensors in ours)
        if i != 2:
            factor = unscale[i] * clip
            adamw16_one(param, grad * factor, mean, variance, 3, weight_decay=weight_decay[i : i + 1])
        for alone, joint in zip((param, mean, variance), (together[0], *together[2:]), strict=True):
            assert torch.equal(alone, joint[i])
        assert torch.equal(grad, together[1][i])

    theirs = copies(ours)
    df.reference.adamw16(*theirs, 3, **{**options, "weight_decay": weight_decay}, unscale=unscale, clip=clip, skip=skip)
    for i in range(n):
        assert_same_state(*([tensors[i] for tensors in (x[0], *x[2:])] for x in (together, theirs)))


def test_more_parameters_than_fit_one_launch(device):
    ours = start_many([(3,)] * 1600, device)
    theirs = copies(ours)
    skip = torch.arange(1600, device=device) % 7 == 0
    df.adamw16(*ours, 2, **ADAMW, skip=skip)
    for i in range(0, 1600, 99):
        if not skip[i]:
            adamw16_one(*(tensors[i] for tensors in theirs), 2)
        assert torch.equal(ours[0][i], theirs[0][i])


def test_a_nonfinite_gradient_that_is_skipped_leaves_no_trace(device):
    ours = start_many(SHAPES[2:4], device)
    before = copies(ours)
    for bad in (float("nan"), float("inf"), -float("inf")):
        ours[1][0][5, 100] = bad
        norm, skip = df.gradient_norm(ours[1])
        assert skip.tolist() == [True, False]
        assert norm.item() == pytest.approx(ours[1][1].abs().item(), rel=1e-6)
        df.adamw16(*ours, 2, **ADAMW, clip=(0.5 / norm).clamp(max=1), skip=skip)
    for i in (0, 2, 3):
        assert torch.equal(ours[i][0], before[i][0])
        assert not torch.equal(ours[i][1], before[i][1])


@pytest.mark.skipif("cuda" not in DEVICES, reason="CUDA graphs need a GPU")
def test_a_step_replays_as_a_cuda_graph():
    """With the norm, clipping and skipping inside; step and learning rate change between replays."""
    device = torch.device("cuda")
    ours = start_many(SHAPES, device)
    theirs = copies(ours)
    step, lr = torch.ones(1, dtype=torch.int64, device=device), torch.zeros(1, device=device)

    def update(lists):
        norm, skip = df.gradient_norm(lists[1])
        df.adamw16(*lists, step, **{**ADAMW, "lr": lr}, clip=(0.5 / norm).clamp(max=1), skip=skip)

    update(copies(ours))  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update(ours)
    for i in range(1, 4):
        step.fill_(i)
        lr.fill_(1e-3 / i)
        for lists in (ours, theirs):
            lists[1][2].fill_(float("nan") if i == 2 else 0.1 * i)
        graph.replay()
        update(theirs)
        for j in (0, 2, 3):
            assert all(torch.equal(mine, wanted) for mine, wanted in zip(ours[j], theirs[j], strict=True))


def test_gradient_norm(device):
    generator = torch.Generator().manual_seed(0)
    shapes = [*SHAPES, (70_001,), (3, 4, 5, 6)]
    grads = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    grads[0][0] = 1e25  # its square is no float
    unscale = torch.tensor([1e-24, *[0.5**i for i in range(1, len(shapes))]], device=device)
    skip = torch.tensor([i == 4 for i in range(len(shapes))], device=device)
    norm, skipped = df.gradient_norm(grads, unscale, skip)
    wanted, wanted_skipped = df.reference.gradient_norm(grads, unscale, skip)
    torch.testing.assert_close(norm, wanted, rtol=1e-6, atol=0)
    assert norm.shape == () and norm.device.type == device.type
    assert torch.equal(skipped, skip) and torch.equal(wanted_skipped, skip)
    again, _ = df.gradient_norm([grad.clone() for grad in grads], unscale, skip)
    assert torch.equal(norm, again)

    views = [grads[8][1:], grads[8][1:].view(10, 7000).T, grads[9].contiguous(memory_format=torch.channels_last)]
    norm, skipped = df.gradient_norm(views)
    torch.testing.assert_close(norm, df.reference.gradient_norm(views)[0], rtol=1e-6, atol=0)
    assert not skipped.any()
    assert df.gradient_norm([grads[1]])[0] == 0


@settings(max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(0, 9), max_size=4), seed=st.integers(0, 100))
def test_odd_shapes(shape, seed):
    for device in DEVICES:
        generator, *ours = start(shape, seed, device)
        theirs = [tensor.clone() for tensor in ours]
        grad = torch.randn(shape, generator=generator).to(device)
        adamw16_one(ours[0], grad, *ours[1:], 1)
        adamw16_one(theirs[0], grad, *theirs[1:], 1, df.reference.adamw16)
        assert_same_state(ours, theirs)


def test_layouts_and_neighbours(device):
    """channels_last parameters, gradients of another layout, and nothing written beyond the tensor."""
    generator, *plain = start((6, 5, 3, 3), device=device)
    grad = torch.randn(6, 5, 3, 3, generator=generator).to(device)
    last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in plain]
    inside = surrounded_in_memory(plain[0], 11)
    adamw16_one(inside, grad, plain[1].clone(), plain[2].clone(), 1)
    assert is_nan_around(inside)
    adamw16_one(last[0], grad, *last[1:], 1)
    adamw16_one(plain[0], grad, *plain[1:], 1)
    assert_equal(plain, last)
    assert torch.equal(inside, plain[0])


def test_same_bits_on_any_number_of_threads_and_at_any_place(device):
    """The last elements too, which do not fill a register."""
    generator, *first = start(70_003, device=device)
    grad = torch.randn(70_003, generator=generator).to(device)

    def two_steps(place=slice(None)):
        state = [tensor[place].clone() for tensor in first]
        for step in (1, 2):
            adamw16_one(state[0], grad[place], *state[1:], step)
        return state

    same_on_any_number_of_threads(lambda: df.gradient_norm([grad, first[0]]))
    whole = same_on_any_number_of_threads(two_steps)
    last = slice(-3, None)
    assert_equal([tensor[last] for tensor in whole], two_steps(last))


def test_opcheck(device):
    lists = start_many([(4, 5), (3,)], device)
    step, lr = torch.tensor(3, device=device), torch.tensor(1e-3, device=device)
    decay, skip = torch.zeros(2, device=device), torch.zeros(2, dtype=torch.bool, device=device)
    arguments = (*lists, step, lr, 0.9, 0.96, 1e-8, decay, None, lr, skip)
    torch.library.opcheck(torch.ops.dalle_fast.adamw16.default, arguments)
    torch.library.opcheck(torch.ops.dalle_fast.gradient_norm.default, (lists[1], decay, skip))


def test_nothing_to_do():
    df.adamw16([], [], [], [], 1, **ADAMW)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": [torch.zeros(4).half()]}, TypeError, r"params\[0\]: expected torch.float32, got torch.float16"),
        ({"params": [torch.zeros(8)[::2]]}, ValueError, r"params\[0\]: expected contiguous .* got strides \(2,\)"),
        ({"grads": [torch.zeros(3)]}, ValueError, r"grads\[0\]: expected \[4\], got \[3\]"),
        ({"grads": []}, ValueError, "grads: expected 1 tensors, as many as params, got 0"),
        (
            {"grads": [torch.zeros(4, device="meta")]},
            ValueError,
            r"grads\[0\]: expected a tensor on cpu, got one on meta",
        ),
        ({"means": [torch.zeros(4)]}, TypeError, r"means\[0\]: expected torch.int16, got torch.float32"),
        ({"variances": [torch.zeros(8).short()[::2]]}, ValueError, r"variances\[0\]: expected the strides of params"),
        ({"step": 0}, ValueError, "step: expected at least 1, got 0"),
        ({"step": torch.ones(1)}, TypeError, "step: expected torch.int64, got torch.float32"),
        ({"lr": float("nan")}, ValueError, "lr: expected a number of at least 0, got nan"),
        ({"beta1": 1.0}, ValueError, r"beta1: expected a number in \[0, 1\), got 1.0"),
        ({"eps": -1.0}, ValueError, "eps: expected a number of at least 0, got -1.0"),
        ({"weight_decay": torch.zeros(2)}, ValueError, r"weight_decay: expected 1 element\(s\), got \[2\]"),
        ({"unscale": torch.zeros(2)}, ValueError, r"unscale: expected 1 element\(s\), got \[2\]"),
        ({"clip": torch.zeros(1).double()}, TypeError, "clip: expected torch.float32, got torch.float64"),
        ({"skip": torch.zeros(1)}, TypeError, "skip: expected torch.bool, got torch.float32"),
    ],
)
def test_bad_input(change, error, message):
    moments = {name: [torch.zeros(4, dtype=torch.int16)] for name in ("means", "variances")}
    arguments = {"params": [torch.zeros(4)], "grads": [torch.zeros(4)], **moments, "step": 1, **ADAMW, **change}
    with pytest.raises(error, match=message):
        df.adamw16(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "grads: expected at least one tensor, got none"),
        (([torch.zeros(2).half()],), TypeError, r"grads\[0\]: expected torch.float32, got torch.float16"),
        (([torch.zeros(2)], torch.zeros(3)), ValueError, r"unscale: expected 1 element\(s\), got \[3\]"),
        (([torch.zeros(2)], None, torch.zeros(1)), TypeError, "skip: expected torch.bool, got torch.float32"),
    ],
)
def test_bad_gradients(arguments, error, message):
    with pytest.raises(error, match=message):
        df.gradient_norm(*arguments)


def test_gradient_norm_of_any_strides(device):
    """Vectors with gaps, expanded elements, permuted and sliced tensors, also empty ones."""
    base = normal(4, 6, 8, 10, device=device)
    grads = [
        base[0, 0, 0, :1].expand(4),
        base[0, 0, 0, ::3],
        base[0, 0, 0, :1].expand(3, 5),
        base[0, 0, :, :1].expand(8, 7),
        base[..., 1],
        base.transpose(0, 3),
        base.contiguous(memory_format=torch.channels_last)[:, ::2],
        base[:, :, ::2, ::5],
        base[:0],
        base[0, 0, 0, 0],
    ]
    unscale = torch.linspace(0.5, 2, len(grads), device=device)
    norm, skipped = df.gradient_norm(grads, unscale)
    wanted, _ = reference.gradient_norm(grads, unscale)
    torch.testing.assert_close(norm, wanted)
    assert not skipped.any()


@pytest.mark.parametrize("shape", [(5, 1), (1, 5), (3, 1, 1), (0, 4), (4, 0)])
def test_strides_of_one_element_and_of_none_have_no_meaning(shape, device):
    param = torch.ones(shape, device=device)
    strange = [torch.zeros(shape[::-1], dtype=torch.int16, device=device).permute(*reversed(range(len(shape))))] * 1
    strange.append(strange[0].clone())
    df.adamw16([param], [torch.ones_like(param)], strange[:1], strange[1:], 1, 0.1, 0.9, 0.95, 1e-8, 0.0)
    assert (param < 1).all()
