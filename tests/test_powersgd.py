"""PowerSGD: four processes against its definition in float64, in one launch; bytes are those that were sent."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.powersgd_processes import (
    HALF_STEP,
    INF,
    LOW_RANK,
    MANY,
    NAN,
    PROCESSES,
    RANK,
    SHAPES,
    STEPS,
    Stack,
    buffers,
    definition,
    gradients,
    loss_of,
    rounded,
    run_all,
    whole,
)
from helpers.processes import run_processes
from helpers.training import DALLE as DALLE_CFG
from torch.testing._internal.distributed.fake_pg import FakeStore

from dalle_fast.config import PRESETS
from dalle_fast.distributed.collectives import Nodes, pack, unpack
from dalle_fast.distributed.powersgd import PowerSGD, fixed_gaussian, orthonormal
from dalle_fast.training.plan import POWERSGD_RANKS, dalle_parameters, plan_paper, powersgd_saving


@pytest.fixture(scope="module")
def results():
    return run_processes(run_all, nodes=PROCESSES)


def everywhere(values: list) -> dict:
    """The values of all processes, which are equal to the bit."""
    for value in values[1:]:
        assert value.keys() == values[0].keys()
        for name, tensor in value.items():
            assert torch.equal(tensor.nan_to_num(nan=-1.0), values[0][name].nan_to_num(nan=-1.0)), name
    return values[0]


# ---------------------------------------------------------------------------------------------- in 16 bits


def test_a_row_is_kept_to_ten_bits_whatever_its_size():
    x = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 0
    x *= torch.tensor([1.0, 1e-30, 1e30, 1e-44, 0.0, 2.0**-119])[:, None]
    x[5, :500] *= 2.0**-20
    packed = pack(x)
    assert (packed.dtype, packed.shape) == (torch.int16, (6, 1001))
    normal = [0, 1, 2, 4, 5]  # 1e-44 is a float32 of four bits
    wanted = rounded(x.double().numpy())
    np.testing.assert_array_equal(unpack(packed)[normal].double().numpy(), wanted[normal])
    np.testing.assert_array_equal(pack(unpack(packed)).numpy(), packed.numpy())


def test_a_row_keeps_what_is_small_beside_its_largest():
    x = torch.tensor([[-3.0, -0.0, 2.0**-60, 2.0**-70]])
    assert unpack(pack(x)).tolist() == [[-3.0, 0.0, 2.0**-60, 0.0]]


def test_what_is_not_finite_comes_out_as_nan():
    x = torch.tensor([[1.0, INF, -2.0], [NAN, -INF, 0.0]])
    wanted = torch.tensor([[1.0, NAN, -2.0], [NAN, NAN, 0.0]])
    assert torch.equal(unpack(pack(x)).nan_to_num(nan=9.0), wanted.nan_to_num(nan=9.0))


# ---------------------------------------------------------------------------------------------- the method


def test_orthonormal():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    x[:, 3] = x[:, 2]
    for matrix in (x, 1e-20 * x, torch.zeros(20, 6), torch.ones(4, 4)):
        basis = orthonormal(matrix)
        assert (basis.T @ basis - torch.eye(basis.shape[1])).abs().max() < 1e-5
        assert (basis @ (basis.T @ matrix) - matrix).norm() <= 1e-5 * matrix.norm()
    x[4, 2] = NAN
    assert orthonormal(x).isnan().all()


def test_random_matrices_stay():
    q = fixed_gaussian(300, 40, seed=1, index=2)
    assert torch.equal(q, fixed_gaussian(300, 40, seed=1, index=2))
    assert abs(q.mean()) < 0.03 and abs(q.std() - 1) < 0.03
    for other in (fixed_gaussian(300, 40, 1, 3), fixed_gaussian(300, 40, 2, 2)):
        assert abs((q * other).mean()) < 0.03


@pytest.mark.parametrize("step", range(STEPS))
def test_low_rank_is_that_of_the_definition(step, results):
    """Close: in float32 now and then a number falls on the other side of where rounding changes."""
    sums, norms, left = definition(step)
    got_sums, got_norms, got_left = (
        everywhere([result["steps"]["record"][step][i] for result in results]) for i in range(3)
    )
    for name in SHAPES:
        all_left = whole(name, [np.sum(part, axis=0) for part in left[name]])
        for got, wanted in ((got_sums[name], sums[name]), (got_left[name], all_left)):
            np.testing.assert_array_equal(got.isnan().numpy(), np.isnan(wanted))
            distance = np.linalg.norm(np.nan_to_num(got.double().numpy() - wanted))
            assert distance <= HALF_STEP * np.linalg.norm(np.nan_to_num(wanted)), name
        assert got_norms[name].item() == pytest.approx(norms[name], rel=HALF_STEP, nan_ok=True)


def test_a_shard_that_is_not_finite_costs_its_own_buffer_only(results):
    """As in the definition, spelt out; q is a third of qkv."""
    for step, node, name, spoiled in ((1, 1, "wide.weight", slice(None)), (2, 2, "qkv.weight", slice(4))):
        sums, norms, left = results[3]["steps"]["record"][step]
        assert sums[name][spoiled].isnan().all()
        assert sum(tensor.isnan().sum() for tensor in sums.values()) == sums[name][spoiled].numel()
        assert [norm.isnan().item() for norm in norms.values()] == [other == name for other in norms]
        kept = sum(buffers(step, other)[name].double() for other in range(PROCESSES) if other != node)
        np.testing.assert_allclose(left[name][spoiled], kept[spoiled], rtol=0, atol=PROCESSES * HALF_STEP * 1e-3)


def test_nothing_is_lost(results):
    """The estimates and the buffers add up to the sum of the gradients, up to rounding; and the buffers are small."""
    applied = [everywhere([result["many_steps"]["applied"][i] for result in results]) for i in (0, MANY - 1)]
    left = everywhere([result["many_steps"]["left"] for result in results])
    behind = []
    for name in SHAPES:
        given = [sum(gradients(STEPS + i, m)[name].double() for m in range(PROCESSES)) for i in range(MANY)]
        total = sum(given)
        behind.append(
            [((x[name] - y).norm() / y.norm()).item() for x, y in zip(applied, (given[0], total), strict=True)]
        )
        assert (applied[1][name] + left[name] - total).norm() < HALF_STEP * total.norm()
    assert all(first > 0.3 and last < 0.1 for first, last in behind), behind


def test_buffers_on_another_number_of_nodes(results):
    """Only their sum is kept; shares of it are rounded anew."""
    left = results[0]["many_steps"]["left"]
    resumed = everywhere([result["many_steps"]["resumed"] for result in results])
    for name in ("qkv.weight", "wide.weight"):
        np.testing.assert_allclose(resumed[name], left[name], rtol=HALF_STEP, atol=0)
    assert not resumed["tall.weight"].any()


def test_full_rank_is_uncompressed(results):
    """But for rounding: each node's Q' is as long as its gradient, and rounded, and so is the sum."""
    model = Stack()
    names = [name for name, _ in model.named_parameters()]
    grads = [
        dict(zip(names, torch.autograd.grad(loss_of(model, node), [*model.parameters()]), strict=True))
        for node in ([0, 1], [2, 3])
    ]
    for case in ("whole", "after"):
        got = everywhere([result["sharded"][case]["gradients"] for result in results])
        for name, gradient in got.items():
            wanted = grads[0][name] + grads[1][name]
            lengths = grads[0][name].norm() + grads[1][name].norm() + wanted.norm()
            compressed = name.startswith("layers") and gradient.ndim == 2
            assert (gradient - wanted).norm() <= (1.01 * HALF_STEP if compressed else 1e-6) * lengths, name
        for name in results[0]["sharded"][case]["norms"]:
            squared = sum(results[shard]["sharded"][case]["norms"][name] for shard in (0, 1))
            assert squared.item() == pytest.approx(got[name].double().square().sum().item(), rel=1e-5)


def test_shards_have_equal_ranks(results):
    message = "rank: expected a multiple of the 2 shards of a matrix, got 3"
    assert [result["sharded"]["refused"] for result in results] == [message] * PROCESSES


def test_nan_on_one_node_reaches_all(results):
    for result in results:
        assert all(gradient.isnan().all() for gradient in result["sharded"]["spoiled"]["gradients"].values())
        assert all(norm.isnan() for norm in result["sharded"]["spoiled"]["norms"].values())


# ---------------------------------------------------------------------------------------------- what is sent


def bytes_of(numbers: int, nodes: int, size: int, head: int) -> int:
    """Bytes that a node sends to sum so many numbers: parts to all others, twice; ``head`` bytes in front of each."""
    return 2 * (nodes - 1) * (size * -(-numbers // nodes) + head)


def test_bytes_are_counted(results):
    """P and Q' of q, k, v, of wide and of tall, whose short sides are 4, 6 and 7."""
    p, q = RANK * (3 * 4 + 6 + 7), RANK * (3 * 10 + 20 + 18)
    wanted = bytes_of(p, PROCESSES, 2, 2) + bytes_of(q, PROCESSES, 2, 2)
    assert all(result["steps"]["sent"] == [wanted] * STEPS for result in results)


@pytest.fixture
def many_nodes():
    """128 nodes, of which 127 do not exist."""
    dist.init_process_group("fake", rank=0, world_size=128, store=FakeStore())
    yield Nodes()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["2.8B", "5.6B", "12B"])
def test_bytes_are_those_of_table_1(name, many_nodes, monkeypatch):
    """The paper's sizes, without memory: what is sent is what ``dalle-fast plan`` says, and saves what table 1 says."""
    monkeypatch.setattr(
        "dalle_fast.distributed.powersgd.fixed_gaussian", lambda *size: torch.empty(size[:2], device="meta")
    )
    cfg, gpus = PRESETS[name].dalle, 8
    d, rank = cfg.d_model, POWERSGD_RANKS[cfg.d_model]
    shapes = {"qkv.weight": (3 * d // 8, d), "out": (d // 8, d), "mlp.0": (4 * d // 8, d), "mlp.2": (d, 4 * d // 8)}
    shards = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    powersgd = PowerSGD(shards, rank // gpus, many_nodes, stacked={"qkv.weight": 3})
    powersgd.compress(shards)
    sent = gpus * cfg.n_layer * many_nodes.sent
    matrices, rest = dalle_parameters(cfg)
    assert 1 - sent / (2 * 127 / 128 * 2 * matrices) == pytest.approx(1 - 5 * rank / (8 * d), abs=1e-4)
    many_nodes.sent = 0
    powersgd.collect(torch.empty(rest // gpus, device="meta"))
    powersgd.finish()
    planned = plan_paper(cfg, 1024, gpus, 128).traffic[f"with PowerSGD of rank {rank}"]
    assert sent + gpus * many_nodes.sent == pytest.approx(planned, rel=1e-3)


def test_low_rank_learns_as_well_with_fewer_bytes(results):
    """At the paper's rank for its width the loss ends within 0.05 of one that falls from 3 to less than 0.1."""
    plain, low = results[0]["training"], results[2]["training"]
    everywhere([result["training"]["parameters"] for result in results[2:]])
    assert plain["losses"][0] == low["losses"][0] > 2.9
    ends = [np.mean([results[i]["training"]["losses"][-10:] for i in pair]) for pair in ((0, 1), (2, 3))]
    assert ends[0] < 0.1
    assert ends[1] < ends[0] + 0.05
    assert plain["sent"][1] == low["sent"][1]
    saving = powersgd_saving(DALLE_CFG.d_model, LOW_RANK, gpus=1)
    assert 1 - low["sent"][0] / plain["sent"][0] == pytest.approx(saving, abs=0.002)


def test_bad_input(many_nodes):
    with pytest.raises(ValueError, match="rank: expected 1 or more, got 0"):
        PowerSGD({}, 0, many_nodes)
    with pytest.raises(ValueError, match=r"a: expected a matrix, got \[2, 3, 4\]"):
        PowerSGD({"a": torch.zeros(2, 3, 4)}, 1, many_nodes)
    powersgd = PowerSGD({"a": torch.zeros(2, 3)}, 1, many_nodes)
    with pytest.raises(KeyError, match="b"):
        powersgd.compress({"b": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"a: expected \[2, 3\], got \[3, 2\]"):
        powersgd.load({"a": torch.zeros(3, 2)})
