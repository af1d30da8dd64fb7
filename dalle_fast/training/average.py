"""The running average of a model's parameters, which is validated and exported (section 2.2, appendix A).

It is kept in the memory of the host. A CUDA device copies the parameters there on a stream of its own, and a thread
adds them to the average, so that neither the device nor the host waits: the average is updated while training goes on.
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
    """The exponential moving average of a model's parameters, or of this process's shards of them.

    Not torch's ``AveragedModel``, whose update waits for the device if its copy is on the host.

    Args:
        model: starts the average and is followed by it. Its parameters must keep their memory and change in place.
        decay: weight of the old average in an update, in [0, 1).
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model, self.decay = model, decay
        named = {name: local(parameter.detach()) for name, parameter in model.named_parameters()}
        self._parameters = list(named.values())
        self._tensors = {name: host_like(tensor).copy_(tensor) for name, tensor in named.items()}
        self._averages = list(self._tensors.values())
        self._host_copy = host_copy_of(self._parameters)
        self._thread = ThreadPoolExecutor(1, "average")
        self._folding: Future[None] | None = None

    def update(self, count: int) -> None:
        """Move the average towards the parameters, for the ``count``-th time.

        The decay starts low and rises to its value over about 10 / (1 - decay) counts: otherwise the average of a short
        run would mostly be the random start.
        """
        share = 1 - min(self.decay, count / (9 + count))
        if self._host_copy is None:
            torch._foreach_lerp_(self._averages, self._parameters, share)
            return
        self.wait()
        self._host_copy.start()
        self._folding = self._thread.submit(self._fold_in, self._host_copy, share)

    def _fold_in(self, host_copy: HostCopy, share: float) -> None:
        torch._foreach_lerp_(self._averages, host_copy.wait(), share)

    def keep_parameters(self) -> None:
        """Queue the copy of the parameters, if one is due, ahead of later work on the device.

        Must be called before the parameters change. The host does not wait.
        """
        if self._folding and self._host_copy:
            self._host_copy.hold_back_device()

    def wait(self) -> None:
        """Wait for the last update; raises its error if it failed."""
        folding, self._folding = self._folding, None
        if folding:
            folding.result()

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The average by parameter name, float32 on the CPU, sharing its memory."""
        self.wait()
        return self._tensors

    @contextmanager
    def in_model(self) -> Iterator[Model]:
        """The model with averaged parameters, in eval mode; afterwards it is restored bit by bit.

        Within, the average holds the values of the parameters: it takes no memory, and nothing may be saved or trained.
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
    """Copies of a device's tensors in the memory of the host, made on a separate stream."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._device = tensors[0].device
        self._streams = torch.get_device_module(self._device)
        self._stream, self._done = self._streams.Stream(self._device), self._streams.Event()
        self._tensors = tensors
        self._copies = [host_like(tensor) for tensor in tensors]

    def start(self) -> None:
        """Queue copies of the tensors' values as they are after all work queued so far."""
        self._stream.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._stream):
            for copy, tensor in zip(self._copies, self._tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
        self._done.record(self._stream)

    def hold_back_device(self) -> None:
        """Queue the end of the copies ahead of later work on the device."""
        self._done.wait(self._streams.current_stream(self._device))

    def wait(self) -> list[torch.Tensor]:
        """Wait for the copies and return them."""
        self._done.synchronize()
        return self._copies


def host_copy_of(tensors: Sequence[torch.Tensor]) -> HostCopy | None:
    """Room for copies of tensors in the memory of the host; None if they are there already."""
    return None if all(tensor.device.type == "cpu" for tensor in tensors) else HostCopy(tensors)


def host_like(tensor: torch.Tensor) -> torch.Tensor:
    """An uninitialised float32 tensor on the CPU; pinned for CUDA, so that the copy can run asynchronously."""
    pinned = tensor.device.type == "cuda"
    return torch.empty_like(tensor, device="cpu", dtype=torch.float32, pin_memory=pinned)
