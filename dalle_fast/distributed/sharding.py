"""A model that the processes of a machine hold together, in equal shards (section 2.5).

A process gathers the parameters of a resblock when it needs them, those of the next one meanwhile, and forgets them
afterwards. Gradients are added up over the processes of the machine, each keeping its shard of the sum, and then over
the machines: shard by shard, while the backward goes on.
"""

from __future__ import annotations

import warnings
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from ..models import KINDS, kind_of
from ..models.clip import ResidualAttentionBlock
from ..models.dvae import ResBlock
from ..models.transformer import DALLE
from .world import World

warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # nothing changes what resblocks return in place
Model = TypeVar("Model", bound=nn.Module)
# What is called of a model beside ``forward``, and needs its parameters.
METHODS = {"dvae": ("loss", "encode", "decode"), "clip": ("loss",)}


def shard_model(model: nn.Module, world: World, powersgd: bool = False) -> None:
    """Share the parameters of a model with the processes of the machine, in place, and move them to the device.

    Each becomes a ``DTensor``, of which this process has its rows; but scalars, which all have.

    Args:
        model: on the CPU, with the same values in all processes; or on "meta": then anything may be in its shards.
        world: of more than one process.
        powersgd: cut matrices that are wider than high into columns, if that is possible without a rest: PowerSGD has
            less to send then. It also adds up the gradients over machines, instead of what is set up here.
    """
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    if not on_meta:
        for scalar in scalars:
            scalar.data = scalar.data.to(world.device)
    resblocks = resblocks_of(model)
    cut = partial(_columns_of_wide, shards=world.shards) if powersgd else None
    for part in (*resblocks, model):
        # The model's own parameters, too, are forgotten after the forward: else a validation would leave them behind.
        fully_shard(
            part,
            mesh=world.mesh,
            reshard_after_forward=True,
            shard_placement_fn=cut if part is not model else None,
            ignored_params=scalars,
        )
        sharded = cast(FSDPModule, part)
        sharded.set_gradient_divide_factor(1.0)  # `backward` divides the loss
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        if world.copies > 1 and not powersgd:
            sharded.set_all_reduce_hook(partial(dist.all_reduce, group=world.peers))
    if on_meta:
        model.to_empty(device=world.device)
    for resblock, following in pairwise(cast("list[FSDPModule]", resblocks)):
        resblock.set_modules_to_forward_prefetch([following])
    for method in METHODS.get(kind_of(model), ()):
        register_fsdp_forward_method(model, method)


def resblocks_of(model: nn.Module) -> list[nn.Module]:
    """The resblocks of a model, in the order in which they run."""
    if isinstance(model, DALLE):
        return [resblock for _, resblock in model.resblocks()]
    return [module for module in model.modules() if isinstance(module, (ResBlock, ResidualAttentionBlock))]


def _columns_of_wide(parameter: nn.Parameter, shards: int) -> Shard | None:
    if parameter.ndim == 2 and parameter.shape[1] > parameter.shape[0] and parameter.shape[1] % shards == 0:
        return Shard(1)
    return None  # rows


def backward(loss: torch.Tensor, model: nn.Module, world: World) -> None:
    """Add the gradient of the mean of the losses of all processes to ``grad``; of sharded parameters, its shards.

    What is divided by the number of processes is the loss, so that gradients in 16 bits do not depend on it.
    """
    (loss / world.size).backward()
    if world.size > 1:
        for parameter in model.parameters():
            if not isinstance(parameter, DTensor):
                dist.all_reduce(cast(torch.Tensor, parameter.grad))


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The shard of a tensor that this process has, in the same memory; of a tensor that is not sharded, all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def counted_here(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """The shard of a tensor, but nothing of one that another process of the machine has as well and counts."""
    return local(tensor) if isinstance(tensor, DTensor) or world.shard == 0 else tensor.new_empty(0)


def shard_of(whole: torch.Tensor, tensor: torch.Tensor, world: World) -> torch.Tensor:
    """The part of a whole, as a view, that this process has if it is sharded as ``tensor`` is; all if that is not."""
    if not isinstance(tensor, DTensor):
        return whole
    (placement,) = tensor.placements
    dim = cast(Shard, placement).dim
    size = whole.shape[dim]
    return whole.narrow(dim, min(world.shard * -(-size // world.shards), size), local(tensor).shape[dim])


def sharded_like(shard: torch.Tensor, tensor: torch.Tensor, world: World) -> torch.Tensor:
    """A shard, on the device or the CPU, as the part of a whole that is sharded as ``tensor`` is, if that is."""
    if not isinstance(tensor, DTensor):
        return shard
    mesh = world.host_mesh if shard.device.type == "cpu" else world.mesh
    return DTensor.from_local(
        shard, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def gather_model(model: Model, world: World) -> Model:
    """A sharded model in one piece, on the CPU and in eval mode; in all processes but the first on "meta", empty."""
    with torch.device("meta"):
        whole = KINDS[kind_of(model)][0](cast(Any, model).cfg)
    values = {}
    for name, tensor in model.state_dict().items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.is_first:
            values[name] = full.cpu()
        del full  # the device need not hold more than one
    if world.is_first:
        whole.load_state_dict(values, assign=True)
    return cast(Model, whole.eval().requires_grad_(False))
