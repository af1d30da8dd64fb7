"""PowerSGD between nodes: sums of gradients by way of two thin matrices (section 2.5, appendix E).

Node i adds its gradient to its error buffer, what earlier steps left over: M_i, [n, k]. Then, with a fixed random Q
[k, r],

    P  = sum of M_i Q over the nodes, [n, r]; made orthonormal
    Q' = sum of M_i^T P, [k, r]
    P Q'^T is the estimate of the sum of the gradients, and M_i - P (M_i^T P)^T stays in the buffer of node i.

So r (n + k) numbers are summed instead of n k, and the buffers of all nodes add up to the sum of all M_i minus its
estimate: nothing is lost but by rounding. Each node subtracts its own share of the estimate, as PowerSGD is defined
(arXiv 1905.13727, algorithm 2). A mean share would leave the nodes' differences in the buffers for good, where they
would add up from step to step and drown the rest in the rounding of 16 bits.

Buffers, P and Q' have 16 bits per number, 1-6-9 with scales (:func:`dalle_fast.distributed.collectives.pack`). Sums are
made in float32; one beyond the format saturates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from ..models.base import TrainableModel
from .collectives import Nodes, all_reduce, pack, unpack

EPSILON = 1e-6  # scale of the identity that is added to P


class PowerSGD:
    """Sums gradients over nodes: matrices by low rank with error feedback, all others as they are.

    Not DDP's ``powerSGD_hook``: here gradients are FSDP's shards, travel in 1-6-9, and are scaled per resblock.

    In every step::

        powersgd.compress(gradients, scales)  # as they become known: all matrices, each once
        powersgd.collect(gradient)  # each of the others
        powersgd.finish()
        norm = sum(powersgd.squared_norms().values()) + ...  # of the others

    A matrix that is not finite on any node becomes NaN on all. Its buffer is then zeroed on the nodes whose own
    gradient was not finite, and kept on the others. Buffers of other matrices do not depend on it, nor on whether the
    step is skipped.

    Args:
        matrices: by name, this process's shard of each matrix to compress, [rows, columns]; only shapes are read.
        rank: of the estimate of a shard.
        nodes: to sum over. All must give the same names, shapes, rank and seed.
        seed: of the random matrices Q.
        stacked: by name, how many matrices a parameter holds below one another, each compressed apart; default 1.

    Raises:
        ValueError: a rank below 1, or a tensor that is not a matrix.
    """

    def __init__(
        self,
        matrices: Mapping[str, torch.Tensor],
        rank: int,
        nodes: Nodes,
        seed: int = 0,
        stacked: Mapping[str, int] | None = None,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank: expected 1 or more, got {rank}")
        for name, matrix in matrices.items():
            if matrix.ndim != 2:
                raise ValueError(f"{name}: expected a matrix, got {list(matrix.shape)}")
        self._rank, self._nodes, self._seed, self._stacked = rank, nodes, seed, stacked or {}
        self._shards = {name: (matrix.shape, matrix.device) for name, matrix in matrices.items()}
        self._errors = {  # packed
            name: [pack(torch.zeros(1, part.numel(), device=matrix.device)) for part in self._parts(name, matrix)]
            for name, matrix in matrices.items()
        }
        self._indices = {name: i for i, name in enumerate(matrices)}
        self._squared_norms: dict[str, torch.Tensor] = {}
        self._rest: list[torch.Tensor] = []

    @torch.no_grad()
    def compress(self, gradients: Mapping[str, torch.Tensor], scales: Mapping[str, torch.Tensor] | None = None) -> None:
        """Replace gradients of some matrices by estimates of their sums over the nodes, in two messages.

        Args:
            gradients: by name; float32 in the shapes of the shards, with any strides.
            scales: by name, scale factor of each gradient, one element (default 1). The sum is multiplied back. It may
                change between steps: the buffers are unscaled.

        Raises:
            KeyError: a matrix of another name.
        """
        parts = [
            (name, part, buffer)
            for name, gradient in gradients.items()
            for part, buffer in zip(self._parts(name, gradient), self._errors[name], strict=True)
        ]
        scale = {name: 1.0 if scales is None else scales.get(name, 1.0) for name in gradients}
        owns = [unpack(buffer).view(part.shape) + part / scale[name] for name, part, buffer in parts]
        randoms = [
            fixed_gaussian(own.shape[1], min(self._rank, own.shape[0]), self._seed, self._indices[name], own.device)
            for own, (name, _, _) in zip(owns, parts, strict=True)
        ]
        estimates = low_rank_sums(owns, randoms, self._nodes)
        self._squared_norms |= {name: g.new_zeros((), dtype=torch.float64) for name, g in gradients.items()}
        for (name, part, buffer), own, (p, own_q, q) in zip(parts, owns, estimates, strict=True):
            finite = q.isfinite().all()
            left = pack((own - p @ own_q.T).reshape(1, -1))
            buffer.copy_(torch.where(finite, left, torch.where(own.isfinite().all(), buffer, 0)))
            part.copy_(torch.where(finite, p @ q.T, torch.nan) * scale[name])
            self._squared_norms[name] += q.double().square().sum()

    def collect(self, gradient: torch.Tensor) -> None:
        """Remember a gradient, float32 of any shape, which ``finish`` replaces by its sum over the nodes."""
        self._rest.append(gradient)

    @torch.no_grad()
    def finish(self) -> None:
        """Sum the collected gradients, in float32 and in one message."""
        for gradient, total in zip(self._rest, all_reduce(self._rest, self._nodes, 32), strict=True):
            gradient.copy_(total)
        self._rest.clear()

    @property
    def sent(self) -> int:
        """Bytes that this process has sent to other nodes so far, in all steps."""
        return self._nodes.sent

    def squared_norms(self) -> dict[str, torch.Tensor]:
        """Squared norms of the estimates of the last step, unscaled, by name; float64 []; NaN if any was not finite.

        P is orthonormal, so they are those of Q'.
        """
        return dict(self._squared_norms)

    # ------------------------------------------------------------------------------------------ checkpoints

    @torch.no_grad()
    def tensors(self) -> dict[str, torch.Tensor]:
        """Sums of the error buffers over the nodes, float32 in the shapes of the shards.

        Collective. Its bytes are not counted as sent.
        """
        sums = {}
        for name, (shape, device) in self._shards.items():
            sums[name] = torch.empty(shape, device=device)
            for part, buffer in zip(self._parts(name, sums[name]), self._errors[name], strict=True):
                part.copy_(unpack(buffer).view(part.shape))
            dist.all_reduce(sums[name], group=self._nodes.group)
        return sums

    @torch.no_grad()
    def load(self, sums: Mapping[str, torch.Tensor]) -> None:
        """Share what ``tensors`` returned equally among the nodes, however many there are; missing names become zeros.

        Raises:
            ValueError: a tensor of another shape.
        """
        for name, (shape, device) in self._shards.items():
            total = sums.get(name, torch.zeros(shape, device=device))
            if total.shape != shape:
                raise ValueError(f"{name}: expected {list(shape)}, got {list(total.shape)}")
            for part, buffer in zip(self._parts(name, total / self._nodes.count), self._errors[name], strict=True):
                buffer.copy_(pack(part.reshape(1, -1)))

    def _parts(self, name: str, shard: torch.Tensor) -> list[torch.Tensor]:
        """The matrices in a shard of a parameter, as views, none of them higher than wide.

        So P is the shorter of the two: its decomposition costs least, and the full rank is exact.
        """
        parts = shard.chunk(self._stacked.get(name, 1))
        return [part if part.shape[0] <= part.shape[1] else part.T for part in parts if part.numel()]


# ---------------------------------------------------------------------------------------------- a sharded model


def resblock_matrices(model: TrainableModel) -> list[str]:
    """Names of the parameters that are compressed: all matrices of resblocks, in the model's order."""
    inside = {parameter for _, resblock in model.resblocks() for parameter in resblock.parameters()}
    return [name for name, parameter in model.named_parameters() if parameter in inside and parameter.ndim == 2]


def sum_between_nodes(
    model: nn.Module,
    matrices: Sequence[str],
    rank: int,
    nodes: Nodes,
    seed: int = 0,
    scales: Mapping[str, torch.Tensor] | None = None,
    stacked: Mapping[str, int] | None = None,
) -> PowerSGD:
    """Sum the gradients of a sharded model over the nodes from now on: matrices within the backward, as they arrive.

    ``finish`` sums the others after each backward. Gradients must be None before it.

    Args:
        model: sharded by ``fully_shard`` over the processes of each node. Submodules that are sharded on their own are
            summed while the backward goes on. FSDP must not divide the gradients of the shards after the hooks of
            ``set_all_reduce_hook``, which this sets.
        matrices: names of the parameters to compress.
        rank: of the estimate of a whole matrix; each shard takes its part of it.
        nodes: the processes that hold the same shards.
        seed, stacked: as in :class:`PowerSGD`.
        scales: by name, scale factor of the gradient of a parameter, read in each backward.

    Raises:
        ValueError: a rank that is not a multiple of the number of shards.
    """
    parameters = cast("dict[str, DTensor]", dict(model.named_parameters()))
    shards = parameters[matrices[0]].device_mesh.size()
    if rank % shards:
        raise ValueError(f"rank: expected a multiple of the {shards} shards of a matrix, got {rank}")
    local_matrices = {name: parameters[name].to_local() for name in matrices}
    powersgd = PowerSGD(local_matrices, rank // shards, nodes, seed, stacked)
    names = {id(parameter): name for name, parameter in parameters.items()}

    def hook(managed: list[str], flat: torch.Tensor) -> None:
        gradients = dict(zip(managed, _cut(flat, [parameters[name] for name in managed]), strict=True))
        powersgd.compress({name: gradient for name, gradient in gradients.items() if name in matrices}, scales)
        for name, gradient in gradients.items():
            if name not in matrices:
                powersgd.collect(gradient)

    for module in model.modules():
        if isinstance(module, FSDPModule):
            managed = [names[id(parameter)] for parameter in _managed(module) if isinstance(parameter, DTensor)]
            module.set_all_reduce_hook(partial(hook, managed))
    return powersgd


def _managed(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that one ``fully_shard`` of a module manages, in the order in which their gradients lie."""
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _managed(child)
    yield from module.parameters(recurse=False)


def _cut(flat: torch.Tensor, parameters: Sequence[DTensor]) -> list[torch.Tensor]:
    """Gradients of shards as views of the memory in which they lie one after another, each padded to the largest.

    Raises:
        RuntimeError: these are not the gradients of all parameters.
    """
    views, start = [], 0
    for parameter in parameters:
        (placement,) = parameter.placements
        shard, dim = parameter.to_local(), cast(Shard, placement).dim
        views.append(flat[start : start + shard.numel()].view(shard.shape))
        most = -(-parameter.shape[dim] // parameter.device_mesh.size())
        start += parameter.numel() // parameter.shape[dim] * most
    if start != flat.numel():
        raise RuntimeError(f"gradients: expected those of all parameters, {start} numbers, got {flat.numel()}")
    return views


# ---------------------------------------------------------------------------------------------- the method


def fixed_gaussian(rows: int, columns: int, seed: int, index: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Q of the index-th matrix, [rows, columns] float32: the same in every step and on every node."""
    generator = torch.Generator(device).manual_seed((seed << 20) + index)
    return torch.randn(rows, columns, generator=generator, device=device)


def orthonormal(x: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns of x, [n, r] with n >= r; NaN if x is not finite.

    ``torch.linalg.qr`` uses Householder reflections on every device: the basis is orthonormal to rounding even if
    columns of x depend on each other. 1e-6 is added to the diagonal, as in appendix E, for an x of zeros. It is
    relative to the largest element, since gradients may be smaller than that.
    """
    finite = x.isfinite().all()
    x = torch.where(finite, x, 0.0)
    x = x / x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
    basis, _ = torch.linalg.qr(x + EPSILON * torch.eye(*x.shape, device=x.device))
    return torch.where(finite, basis, torch.nan)


def low_rank_sums(
    matrices: Sequence[torch.Tensor], randoms: Sequence[torch.Tensor], nodes: Nodes
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Low-rank estimates P Q'^T of sums of matrices over nodes, all in two messages.

    Args:
        matrices: this node's, [n, k] each.
        randoms: Q of each, [k, r] with r <= n.

    Returns:
        For each matrix P [n, r], this node's summand of Q' [k, r], and Q' [k, r].
    """
    sketches = all_reduce([m @ q for m, q in zip(matrices, randoms, strict=True)], nodes, 16)
    bases = [orthonormal(sketch) for sketch in sketches]
    own = [m.T @ p for m, p in zip(matrices, bases, strict=True)]
    return list(zip(bases, own, all_reduce(own, nodes, 16), strict=True))
