"""PowerSGD by its definition in float64, and what four processes do with it: see test_powersgd.py."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from dalle_fast.config import DALLEConfig
from dalle_fast.distributed.collectives import Machines, all_reduce
from dalle_fast.distributed.powersgd import PowerSGD, fixed_gaussian, resblock_matrices, sum_between_machines
from dalle_fast.models import DALLE
from dalle_fast.ops import adamw16

PROCESSES = 4
HALF_STEP = 2.0**-10  # relative error of rounding to 1-6-9
NAN, INF = math.nan, math.inf

# ---------------------------------------------------------------------------------------------- the definition

SHAPES = {"qkv.weight": (12, 10), "wide.weight": (6, 20), "tall.weight": (18, 7)}
RANK, SEED, UPDATES = 3, 5, 5
# By update, machine and name: an element of row 0.
SPOILED = {(1, 1, "wide.weight"): NAN, (2, 2, "qkv.weight"): INF, (4, 3, "tall.weight"): NAN}
CONTINUED = 4  # the update that starts from the buffers of the one before; the others have buffers of their own


def values(seed: int) -> dict[str, torch.Tensor]:
    """What a machine has of each matrix: something that all share and that stays, and noise of its own."""
    same, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1 + seed)
    return {
        name: 1e-4 * (torch.randn(shape, generator=same) + torch.randn(shape, generator=own))
        for name, shape in SHAPES.items()
    }


def gradients(update: int, machine: int) -> dict[str, torch.Tensor]:
    given = values(PROCESSES * update + machine)
    for (at, where, name), value in SPOILED.items():
        if (at, where) == (update, machine):
            given[name][0, 2] = value
    return given


def buffers(update: int, machine: int) -> dict[str, torch.Tensor]:
    """The error buffers before an update."""
    return values(-PROCESSES * update - machine)


def scale(update: int) -> float:
    """Of the gradient of tall.weight."""
    return 2.0 ** (13 + update % 3)


def rounded(x: np.ndarray) -> np.ndarray:
    """To 10 significant bits, half away from zero: 1-6-9 with a scale."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.sign(mantissa) * np.floor(np.abs(mantissa) * 1024 + 0.5), exponent - 10)


def parts(name: str, x: np.ndarray) -> list[np.ndarray]:
    cut = np.split(x, 3) if name == "qkv.weight" else [x]
    return [part.T if len(part) > len(part[0]) else part for part in cut]


def whole(name: str, cut: list[np.ndarray]) -> np.ndarray:
    n, k = SHAPES[name][0] // len(cut), SHAPES[name][1]
    return np.concatenate([part.reshape(n, k) if n <= k else part.T for part in cut])


def sum_of(shares: list[np.ndarray]) -> np.ndarray:
    """As machines add up: rounded before and after."""
    return rounded(np.sum([rounded(share) for share in shares], axis=0))


def low_rank_sum(gradients: list[np.ndarray], errors: list[np.ndarray], q: np.ndarray):
    """The estimate of the sum, its squared norm, and what is left over on each machine."""
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


def definition(update: int) -> tuple[dict, dict, dict]:
    """By name: the sums, whole; their squared norms; and the error buffers afterwards, by part and machine."""
    sums, norms, left = {}, {}, {}
    earlier = definition(update - 1)[2] if update == CONTINUED else None
    for index, name in enumerate(SHAPES):
        given, loaded = (
            [parts(name, f(update, machine)[name].double().numpy()) for machine in range(PROCESSES)]
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


def updates(rank: int) -> dict:
    """The updates of the definition, on four machines."""
    machines = Machines()
    powersgd = PowerSGD({name: torch.empty(shape) for name, shape in SHAPES.items()}, RANK, machines, SEED)
    record, sent = [], []
    for update in range(UPDATES):
        if update != CONTINUED:
            powersgd.load({name: PROCESSES * buffer for name, buffer in buffers(update, rank).items()})
        given, before = gradients(update, rank), machines.sent
        given["tall.weight"] *= scale(update)
        powersgd.compress(given, {"tall.weight": torch.tensor(scale(update))})
        given["tall.weight"] /= scale(update)
        sent.append(machines.sent - before)
        record.append((given, powersgd.squared_norms(), powersgd.tensors()))
    return {"record": record, "sent": sent}


MANY = 60


def many_updates(rank: int) -> dict:
    """What is applied in the long run; and the buffers of half as many machines that go on from there."""
    powersgd = PowerSGD({name: torch.empty(shape) for name, shape in SHAPES.items()}, RANK, Machines(), SEED)
    totals, record = {name: torch.zeros(shape).double() for name, shape in SHAPES.items()}, []
    for update in range(UPDATES, UPDATES + MANY):
        given = gradients(update, rank)
        powersgd.compress(given)
        for name, estimate in given.items():
            totals[name] += estimate
        record.append({name: total.clone() for name, total in totals.items()})
    left = powersgd.tensors()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    two = PowerSGD(left, RANK, Machines(pairs[rank // 2]), SEED)
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
    """Two machines of two processes: gradients of FSDP's shards at full rank, and after a NaN in one of them."""
    machine, shard = divmod(rank, 2)
    between = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    inside = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])][machine]
    model = Stack()
    for part in (*model.layers, model):
        fully_shard(part, mesh=inside, shard_placement_fn=lambda p: Shard(1) if p.shape == (8, 34) else None)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    machines = Machines(between[shard])
    matrices = [name for name, p in model.named_parameters() if name.startswith("layers") and p.ndim == 2]
    try:
        sum_between_machines(model, matrices, 3, machines)
    except ValueError as error:
        refused = str(error)
    powersgd = sum_between_machines(model, matrices, FULL_RANK, machines)
    results = {"refused": refused}
    for case in ("whole", "spoiled", "after"):
        model.zero_grad()
        loss = loss_of(model, [rank])
        (loss * (NAN if case == "spoiled" and rank == 2 else 1)).backward()
        powersgd.finish()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        results[case] = {"gradients": gradients, "norms": powersgd.squared_norms()}
    return results


SMALL = DALLEConfig(
    text_vocab=270, text_len=6, image_vocab=16, height=4, width=4, d_model=16, n_layer=2, head_dim=8, kernel=3
)
CODES = torch.randint(0, SMALL.image_vocab, (8, 4, 4), generator=torch.Generator().manual_seed(6))
LOW_RANK, STEPS, BATCH = 4, 100, 4  # rank / d_model is about the paper's


def training(rank: int) -> dict:
    """A transformer learns pictures by heart on two machines, without PowerSGD on the first two, with it on the last.

    Matrices of resblocks take 16 bits in either case.
    """
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair, machine = divmod(rank, 2)
    torch.manual_seed(0)
    model, machines = DALLE(SMALL), Machines(pairs[pair])
    parameters, matrices = dict(model.named_parameters()), resblock_matrices(model)
    powersgd = PowerSGD({name: parameters[name] for name in matrices}, LOW_RANK, machines)
    weights = [*parameters.values()]
    moments = [[torch.zeros_like(weight, dtype=torch.int16) for weight in weights] for _ in range(2)]
    losses, sent, draw = [], [0, 0], torch.Generator().manual_seed(1)
    for step in range(STEPS):
        chosen = torch.randperm(len(CODES), generator=draw)[: 2 * BATCH].view(2, BATCH)[machine]
        loss = model.loss(chosen[:, None].expand(-1, SMALL.text_len), CODES[chosen])[0]
        model.zero_grad()
        (loss / 2).backward()
        gradients = {name: parameters[name].grad for name in matrices}
        before = machines.sent
        if pair == 1:
            powersgd.compress(gradients)
        else:
            for gradient, total in zip(
                gradients.values(), all_reduce([*gradients.values()], machines, 16), strict=True
            ):
                gradient.copy_(total)
        between = machines.sent
        for name, parameter in parameters.items():
            if name not in gradients:
                powersgd.collect(parameter.grad)
        powersgd.finish()
        sent[0] += between - before
        sent[1] += machines.sent - between
        adamw16(weights, [weight.grad for weight in weights], *moments, step + 1, 5e-3, 0.9, 0.999, 1e-8, 0.0)
        losses.append(loss.item())
    return {"losses": losses, "sent": sent, "parameters": parameters}


def worker(rank: int, folder) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    torch.save({run.__name__: run(rank) for run in (updates, many_updates, sharded, training)}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
