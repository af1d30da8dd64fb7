"""The running average of a model's parameters, which is what is validated and exported (sections 2.2, appendix A).

It is kept in the memory of the host. A CUDA device copies the parameters there on a stream of its own, and a thread
folds them in, so that neither the device nor the host waits: an update of the average goes on while training does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import nn

from ..distributed.sharding import local

Model = TypeVar("Model", bound=nn.Module)


class RunningAverage(Generic[Model]):
    """The exponential moving average of the parameters of a model; of their local shards, if they are sharded.

    Args:
        model: where it starts, and what it follows. Its parameters stay where they are and change in place.
        decay: what an update leaves of the average, in [0, 1).
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model, self.decay = model, decay
        named = {name: local(parameter.detach()) for name, parameter in model.named_parameters()}
        self._parameters = list(named.values())
        self._tensors = {name: host_like(tensor).copy_(tensor) for name, tensor in named.items()}
        self._averages = list(self._tensors.values())
        on_host = all(tensor.device.type == "cpu" for tensor in self._parameters)
        self.host_copy = None if on_host else HostCopy(self._parameters)
        self._thread = ThreadPoolExecutor(1, "average")
        self._folding: Future[None] | None = None

    def update(self, count: int) -> None:
        """Move the average towards the parameters, for the ``count``-th time.

        The decay starts low and rises to its value over about 10 / (1 - decay) counts: else the average of a short run
        would mostly be the random start.
        """
        share = 1 - min(self.decay, count / (9 + count))
        if self.host_copy is None:
            torch._foreach_lerp_(self._averages, self._parameters, share)
            return
        self.wait()
        self.host_copy.start()
        self._folding = self._thread.submit(self._fold_in, self.host_copy, share)

    def _fold_in(self, host_copy: HostCopy, share: float) -> None:
        torch._foreach_lerp_(self._averages, host_copy.wait(), share)

    def keep_parameters(self) -> None:
        """Have the device copy the parameters, if it is about to, before it does what it is told next.

        To be called before anything changes the parameters. The host does not wait.
        """
        if self._folding and self.host_copy:
            self.host_copy.hold_back_device()

    def wait(self) -> None:
        """Return when the last update is done; raise what kept it from being done."""
        folding, self._folding = self._folding, None
        if folding:
            folding.result()

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The average, float32 on the CPU, by the names of the parameters: to be saved, or filled from a checkpoint."""
        self.wait()
        return self._tensors

    @contextmanager
    def in_model(self) -> Iterator[Model]:
        """The model with averaged parameters and in eval mode; afterwards it is bit by bit what it was.

        Within, the average holds the values of the parameters: no memory is taken, and nothing may be saved or trained.
        """
        training = self.model.training
        self.swap()
        self.model.eval()
        try:
            yield self.model
        finally:
            self.swap()
            self.model.train(training)

    def swap(self) -> None:
        """Exchange the values of the average and of the parameters."""
        self.wait()
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            value = parameter.to("cpu", copy=True)
            parameter.copy_(average)
            average.copy_(value)


class HostCopy:
    """Copies of tensors of a device in the memory of the host, taken on a stream of their own."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._device = tensors[0].device
        self._streams = torch.get_device_module(self._device)
        self._stream, self._done = self._streams.Stream(self._device), self._streams.Event()
        self._tensors = tensors
        self._copies = [host_like(tensor) for tensor in tensors]

    def start(self) -> None:
        """Copy what the tensors hold when the device has done all that it has been told so far."""
        self._stream.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._stream):
            for copy, tensor in zip(self._copies, self._tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
        self._done.record(self._stream)

    def hold_back_device(self) -> None:
        """Have the device finish the copies before it does what it is told next."""
        self._done.wait(self._streams.current_stream(self._device))

    def wait(self) -> list[torch.Tensor]:
        """The copies, when they are there."""
        self._done.synchronize()
        return self._copies


def host_like(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 tensor on the CPU, with anything in it, to which the device of ``tensor`` can copy it unattended."""
    pinned = tensor.device.type == "cuda"
    return torch.empty_like(tensor, device="cpu", dtype=torch.float32, pin_memory=pinned)
