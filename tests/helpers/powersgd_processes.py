"""PowerSGD by its definition in float64, and what four processes do with it: see test_powersgd.py."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from helpers.training import DALLE as DALLE_CFG
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from dalle_fast.distributed.collectives import Nodes, all_reduce
from dalle_fast.distributed.powersgd import PowerSGD, fixed_gaussian, resblock_matrices, sum_between_nodes
from dalle_fast.distributed.world import World
from dalle_fast.models import DALLE
from dalle_fast.ops import adamw16

PROCESSES = 4
HALF_STEP = 2.0**-10  # relative error of rounding to 1-6-9
NAN, INF = math.nan, math.inf

# ---------------------------------------------------------------------------------------------- the definition

SHAPES = {"qkv.weight": (12, 10), "wide.weight": (6, 20), "tall.weight": (18, 7)}
STACKED = {"qkv.weight": 3}
RANK, SEED, STEPS = 3, 5, 5
# By step, node and name: an element of row 0.
SPOILED = {(1, 1, "wide.weight"): NAN, (2, 2, "qkv.weight"): INF, (4, 3, "tall.weight"): NAN}
CONTINUED = 4  # the step that starts from the buffers of the one before; the others have buffers of their own


def values(seed: int) -> dict[str, torch.Tensor]:
    """A node's values of each matrix: a constant part that all nodes share, and noise of its own."""
    same, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + seed)
    return {
        name: 1e-4 * (torch.randn(shape, generator=same) + torch.randn(shape, generator=own))
        for name, shape in SHAPES.items()
    }


def gradients(step: int, node: int) -> dict[str, torch.Tensor]:
    given = values(PROCESSES * step + node)
    for (at, where, name), value in SPOILED.items():
        if (at, where) == (step, node):
            given[name][0, 2] = value
    return given


def buffers(step: int, node: int) -> dict[str, torch.Tensor]:
    """The error buffers before a step."""
    return values(-PROCESSES * step - node)


def scale(step: int) -> float:
    """Scale factor of the gradient of tall.weight."""
    return 2.0 ** (13 + step % 3)


def rounded(x: np.ndarray) -> np.ndarray:
    """To 10 significant bits, half away from zero: 1-6-9 with a scale."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.sign(mantissa) * np.floor(np.abs(mantissa) * 1024 + 0.5), exponent - 10)


def parts(name: str, x: np.ndarray) -> list[np.ndarray]:
    cut = np.split(x, STACKED.get(name, 1))
    return [part.T if len(part) > len(part[0]) else part for part in cut]


def whole(name: str, cut: list[np.ndarray]) -> np.ndarray:
    n, k = SHAPES[name][0] // len(cut), SHAPES[name][1]
    return np.concatenate([part.reshape(n, k) if n <= k else part.T for part in cut])


def sum_of(shares: list[np.ndarray]) -> np.ndarray:
    """Sum over nodes: rounded before and after."""
    return rounded(np.sum([rounded(share) for share in shares], axis=0))


def low_rank_sum(gradients: list[np.ndarray], errors: list[np.ndarray], q: np.ndarray):
    """The estimate of the sum, its squared norm, and the new error buffer of each node."""
    owns = [gradient + error for gradient, error in zip(gradients, errors, strict=True)]
    if not np.isfinite(owns).all():
        left = [error if np.isfinite(own).all() else 0 * error for own, error in zip(owns, errors, strict=True)]
        return np.full_like(owns[0], NAN), NAN, left
    p = sum_of([own @ q for own in owns])
    p, _ = np.linalg.qr(p / np.abs(p).max() + 1e-6 * np.eye(*p.shape))
    shares = [own.T @ p for own in owns]
    q = sum_of(shares)
    left = [rounded(own - p @ share.T) for own, share in zip(owns, shares, strict=True)]
    return p @ q.T, (q**2).sum(), left


def definition(step: int) -> tuple[dict, dict, dict]:
    """By name: the sums, whole; their squared norms; and the error buffers afterwards, by part and node."""
    sums, norms, left = {}, {}, {}
    earlier = definition(step - 1)[2] if step == CONTINUED else None
    for index, name in enumerate(SHAPES):
        given, loaded = (
            [parts(name, f(step, node)[name].double().numpy()) for node in range(PROCESSES)]
            for f in (gradients, buffers)
        )
        estimates, norms[name], left[name] = [], 0.0, []
        for i, part in enumerate(given[0]):
            q = fixed_gaussian(part.shape[1], RANK, SEED, index).double().numpy()
            errors = earlier[name][i] if earlier else [rounded(x[i]) for x in loaded]
            estimate, norm, errors = low_rank_sum([x[i] for x in given], errors, q)
            estimates.append(estimate)
            left[name].append(errors)
            norms[name] += norm
        sums[name] = whole(name, estimates)
    return sums, norms, left


# ---------------------------------------------------------------------------------------------- in each process


def new_powersgd(nodes: Nodes) -> PowerSGD:
    return PowerSGD({name: torch.empty(shape) for name, shape in SHAPES.items()}, RANK, nodes, SEED, STACKED)


def steps(rank: int) -> dict:
    """The steps of the definition, on four nodes."""
    nodes = Nodes()
    powersgd = new_powersgd(nodes)
    record, sent = [], []
    for step in range(STEPS):
        if step != CONTINUED:
            powersgd.load({name: PROCESSES * buffer for name, buffer in buffers(step, rank).items()})
        given, before = gradients(step, rank), nodes.sent
        given["tall.weight"] *= scale(step)
        powersgd.compress(given, {"tall.weight": torch.tensor(scale(step))})
        given["tall.weight"] /= scale(step)
        sent.append(nodes.sent - before)
        record.append((given, powersgd.squared_norms(), powersgd.tensors()))
    return {"record": record, "sent": sent}


MANY = 60


def many_steps(rank: int) -> dict:
    """Sums of the estimates in the long run; and the buffers of half as many nodes that go on from there."""
    powersgd = new_powersgd(Nodes())
    totals, record = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}, []
    for step in range(STEPS, STEPS + MANY):
        given = gradients(step, rank)
        powersgd.compress(given)
        for name, estimate in given.items():
            totals[name] += estimate
        record.append({name: total.clone() for name, total in totals.items()})
    left = powersgd.tensors()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    two = new_powersgd(Nodes(pairs[rank // 2]))
    two.load({name: tensor for name, tensor in left.items() if name != "tall.weight"})
    return {"applied": record, "left": left, "resumed": two.tensors()}


FULL_RANK = 2 * 17  # two shards of a matrix of 34 columns


class Stack(nn.Module):
    """Linear layers with shards of unequal sizes, of rows and of columns; the last belongs to the root."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(9, 5), nn.Linear(5, 11), nn.Linear(11, 34), nn.Linear(34, 8)])
        self.out = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.out(x)


def loss_of(model: nn.Module, processes: list[int]) -> torch.Tensor:
    """The loss of the inputs of some processes, three each."""
    x = torch.randn(PROCESSES, 3, 9, generator=torch.Generator().manual_seed(4))[processes].flatten(0, 1)
    return model(x).square().sum()


def sharded(rank: int) -> dict:
    """Two nodes of two processes: gradients of FSDP's shards at full rank, and after a NaN in one of them."""
    node, shard = divmod(rank, 2)
    between = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    inside = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])][node]
    model = Stack()
    for part in (*model.layers, model):
        fully_shard(part, mesh=inside, shard_placement_fn=lambda p: Shard(1) if p.shape == (8, 34) else None)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    nodes = Nodes(between[shard])
    matrices = [name for name, p in model.named_parameters() if name.startswith("layers") and p.ndim == 2]
    try:
        sum_between_nodes(model, matrices, 3, nodes)
    except ValueError as error:
        refused = str(error)
    powersgd = sum_between_nodes(model, matrices, FULL_RANK, nodes)
    results = {"refused": refused}
    for case in ("whole", "spoiled", "after"):
        model.zero_grad()
        loss = loss_of(model, [rank])
        (loss * (NAN if case == "spoiled" and rank == 2 else 1)).backward()
        powersgd.finish()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        results[case] = {"gradients": gradients, "norms": powersgd.squared_norms()}
    return results


CODES = torch.randint(0, DALLE_CFG.image_vocab, (8, 4, 4), generator=torch.Generator().manual_seed(6))
LOW_RANK, LESSONS, BATCH = 4, 100, 4  # rank / d_model is about the paper's


def training(rank: int) -> dict:
    """A transformer learns images by heart on two nodes, without PowerSGD on the first two, with it on the last.

    Matrices of resblocks take 16 bits in either case.
    """
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair, node = divmod(rank, 2)
    torch.manual_seed(0)
    model, nodes = DALLE(DALLE_CFG), Nodes(pairs[pair])
    parameters, matrices = dict(model.named_parameters()), resblock_matrices(model)
    compressed = {name: parameters[name] for name in matrices}
    powersgd = PowerSGD(compressed, LOW_RANK, nodes, stacked=model.stacked_matrices())
    weights = [*parameters.values()]
    moments = [[torch.zeros_like(weight, dtype=torch.int16) for weight in weights] for _ in range(2)]
    losses, sent, draw = [], [0, 0], torch.Generator().manual_seed(1)
    for step in range(LESSONS):
        chosen = torch.randperm(len(CODES), generator=draw)[: 2 * BATCH].view(2, BATCH)[node]
        loss, _ = model.loss(chosen[:, None].expand(-1, DALLE_CFG.text_len), CODES[chosen])
        model.zero_grad()
        (loss / 2).backward()
        gradients = {name: parameters[name].grad for name in matrices}
        before = nodes.sent
        if pair == 1:
            powersgd.compress(gradients)
        else:
            totals = all_reduce([*gradients.values()], nodes, 16)
            for gradient, total in zip(gradients.values(), totals, strict=True):
                gradient.copy_(total)
        between = nodes.sent
        for name, parameter in parameters.items():
            if name not in gradients:
                powersgd.collect(parameter.grad)
        powersgd.finish()
        sent[0] += between - before
        sent[1] += nodes.sent - between
        adamw16(weights, [weight.grad for weight in weights], *moments, step + 1, 5e-3, 0.9, 0.999, 1e-8, 0.0)
        losses.append(loss.item())
    return {"losses": losses, "sent": sent, "parameters": parameters}


def run_all(world: World) -> dict:
    return {run.__name__: run(world.rank) for run in (steps, many_steps, sharded, training)}
