"""A model in equal shards, one per process of a node (section 2.5).

A process gathers the parameters of a resblock when it needs them, prefetches those of the next one, and frees them
afterwards. Gradients are summed over the processes of the node, each keeping its shard of the sum, and then over the
nodes: shard by shard, while the backward goes on.
"""

from __future__ import annotations

import warnings
from functools import partial
from itertools import pairwise
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from ..models import KINDS, kind_of
from ..models.base import TrainableModel
from .world import World

warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # nothing changes resblocks' outputs in place
Model = TypeVar("Model", bound=TrainableModel)


def shard_model(model: TrainableModel, world: World, powersgd: bool = False) -> None:
    """Shard the parameters of a model over the processes of the node, in place, and move the shards to the device.

    Each parameter becomes a ``DTensor``, of which this process has its rows. Scalars are not sharded.

    Args:
        model: on the CPU, with the same values in all processes; or on "meta": its shards are then uninitialised.
        world: of more than one process.
        powersgd: cut matrices that are wider than high into columns where they divide evenly, so that PowerSGD sends
            less; and leave the sum of gradients over nodes to it.
    """
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    if not on_meta:
        for scalar in scalars:
            scalar.data = scalar.data.to(world.device)
    resblocks = [resblock for _, resblock in model.resblocks()]
    cut = partial(_columns_of_wide, shards=world.shards) if powersgd else None
    for part in (*resblocks, model):
        # The model's own parameters, too, are freed after the forward: a validation would leave them gathered.
        fully_shard(
            part,
            mesh=world.mesh,
            reshard_after_forward=True,
            shard_placement_fn=cut if part is not model else None,
            ignored_params=scalars,
        )
        sharded = cast(FSDPModule, part)
        sharded.set_gradient_divide_factor(1.0)  # `backward` divides the loss
        sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
        if world.copies > 1 and not powersgd:
            sharded.set_all_reduce_hook(partial(dist.all_reduce, group=world.peers))
    if on_meta:
        model.to_empty(device=world.device)
    for resblock, following in pairwise(cast("list[FSDPModule]", resblocks)):
        resblock.set_modules_to_forward_prefetch([following])
    for method in model.entry_points:
        register_fsdp_forward_method(model, method)


def _columns_of_wide(parameter: nn.Parameter, shards: int) -> Shard | None:
    if parameter.ndim == 2 and parameter.shape[1] > parameter.shape[0] and parameter.shape[1] % shards == 0:
        return Shard(1)
    return None  # rows


def backward(loss: torch.Tensor, model: nn.Module, world: World, last: bool = True) -> None:
    """Add the gradient of the mean loss of all processes to ``grad``; for sharded parameters, its shards.

    Of several losses whose gradients are summed, all but the ``last`` leave those of unsharded parameters to it.

    The loss is divided by the number of processes, not the gradients: those in 16 bits keep their size.
    """
    (loss / world.size).backward()
    if world.size > 1 and last:
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):
                dist.all_reduce(cast(torch.Tensor, parameter.grad))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor, in the same memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def counted_here(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """This process's shard of a tensor; an unsharded tensor in the first process of a node, empty in the others."""
    return local(tensor) if isinstance(tensor, DTensor) or world.shard == 0 else tensor.new_empty(0)


def shard_of(whole: torch.Tensor, tensor: torch.Tensor, world: World) -> torch.Tensor:
    """This process's part of ``whole``, as a view, if sharded like ``tensor``; all of it if that is not sharded."""
    if not isinstance(tensor, DTensor):
        return whole
    (placement,) = tensor.placements
    dim = cast(Shard, placement).dim
    size = whole.shape[dim]
    return whole.narrow(dim, min(world.shard * -(-size // world.shards), size), local(tensor).shape[dim])


def sharded_like(shard: torch.Tensor, tensor: torch.Tensor, world: World) -> torch.Tensor:
    """A shard, on the device or the CPU, as a tensor sharded like ``tensor``; unchanged if that is not sharded."""
    if not isinstance(tensor, DTensor):
        return shard
    mesh = world.host_mesh if shard.device.type == "cpu" else world.mesh
    return DTensor.from_local(
        shard, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def gather_model(model: Model, world: World) -> Model:
    """A sharded model in one piece, on the CPU and in eval mode; on "meta" in all processes but the first."""
    with torch.device("meta"):
        whole = cast(Model, KINDS[kind_of(model)][0](model.cfg))
    whole.trained_with = model.trained_with
    values = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_first:
            values[name] = full.cpu()
        del full  # the device holds one whole parameter at a time
    if world.is_first:
        whole.load_state_dict(values, assign=True)
    return whole.eval().requires_grad_(False)
