"""Sums over nodes, in 16 bits or 32, with every sent byte counted.

No backend of torch.distributed can add numbers in 1-6-9. So every node sums one part of the numbers: it receives the
others' 16-bit codes of that part, adds them in float32, and sends back codes of the sum. A number crosses the network
twice, as in any all-reduce, and all nodes hold the same bits afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..minifloat import decode, encode

EXPONENT_OF_LARGEST = 4  # numbers in 1-6-9 are below 2^4
NAN_CODE = -0x8000  # the code of -0, as int16
SMALLEST_EXPONENT = -120  # of a row's largest number; 2^124 is still a float32


class Nodes:
    """The processes that hold the same shard, one per node, and a count of the bytes sent between them.

    Args:
        group: these processes; None is the default group.

    Attributes:
        count: number of nodes.
        sent: bytes sent to other nodes so far.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.count = dist.get_world_size(group)
        self.sent = 0

    def exchange(self, rows: torch.Tensor) -> torch.Tensor:
        """Send row i of [count, n] to node i; row i of the result comes from node i."""
        rows = rows.contiguous()
        received = torch.empty_like(rows)
        # As bytes, which every backend can send.
        outgoing, incoming = (x.view(-1).view(torch.uint8) for x in (rows, received))
        dist.all_to_all_single(incoming, outgoing, group=self.group)
        self.sent += (self.count - 1) * rows[0].nbytes
        return received


# ---------------------------------------------------------------------------------------------- sums


def all_reduce(tensors: Sequence[torch.Tensor], nodes: Nodes, bits: Literal[16, 32]) -> list[torch.Tensor]:
    """Sums over nodes, sent in float32, or in 1-6-9 with scales.

    In 16 bits numbers are rounded before they are added, and once more afterwards. A number that is not finite becomes
    NaN, and a sum beyond the range of float32 becomes its largest number.

    Args:
        tensors: float32, any shapes, the same on all nodes.

    Returns:
        The sums, float32, the same bits on all nodes.
    """
    if not any(tensor.numel() for tensor in tensors):
        return [tensor.clone() for tensor in tensors]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    rows = F.pad(flat, (0, -len(flat) % nodes.count)).view(nodes.count, -1)  # node i sums row i
    if bits == 16:
        total = unpack(nodes.exchange(pack(rows))).sum(0, keepdim=True)
        largest = torch.finfo(total.dtype).max
        share = pack(total.clamp(-largest, largest))
        summed = unpack(nodes.exchange(share.expand(nodes.count, -1)))
    else:
        share = nodes.exchange(rows).sum(0, keepdim=True)
        summed = nodes.exchange(share.expand(nodes.count, -1))
    parts = summed.view(-1)[: len(flat)].split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def pack(x: torch.Tensor) -> torch.Tensor:
    """Encode rows in 1-6-9, each scaled by the power of two that brings its largest number to the top of the format.

    So a row keeps all numbers down to 2^-63 of its largest, whatever their size. A number that is not finite takes the
    code of -0, which no other number has.

    Args:
        x: float32 [n_rows, n], n >= 1.

    Returns:
        int16 [n_rows, 1 + n]: the exponent of the row, and its codes.
    """
    finite = x.isfinite()
    largest = torch.where(finite, x, 0.0).abs().amax(1, keepdim=True)
    exponent = torch.frexp(largest).exponent.clamp(min=SMALLEST_EXPONENT)  # largest = mantissa * 2^exponent
    codes = encode(torch.ldexp(x, EXPONENT_OF_LARGEST - exponent), "1-6-9").view(torch.int16)
    codes = torch.where(codes == NAN_CODE, 0, codes)
    return torch.cat([exponent.to(torch.int16), torch.where(finite, codes, NAN_CODE)], dim=1)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Decode what ``pack`` returned: float32 [n_rows, n]."""
    exponent, codes = packed[:, :1].int(), packed[:, 1:]
    x = torch.ldexp(decode(codes, "1-6-9"), exponent - EXPONENT_OF_LARGEST)
    return torch.where(codes == NAN_CODE, torch.nan, x)
