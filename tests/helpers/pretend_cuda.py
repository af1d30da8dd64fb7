"""A pretended CUDA device: its tensors report that device, and are stored and computed on the host.

It finds errors of a GPU that leave all numbers right: tensors of two devices in one op, a generator of another device,
``.numpy()``, and in a step that is recorded as a CUDA graph, an op that waits for the device, or state outside of
tensors. It does not model kernels, concurrent streams or memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}  # between devices
# Indices may be on the CPU; the values that are read or written may not.
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten.index_put.default}
HOST_READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}


class OnCuda(torch.Tensor):
    """A tensor that shares its memory with ``host``, a tensor of the CPU."""

    device, is_cuda, is_cpu = CUDA, True, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, real: torch.Tensor) -> OnCuda:
        return torch.Tensor._make_subclass(cls, real.detach())

    def __init__(self, real: torch.Tensor) -> None:
        self.host = real.detach()

    def __repr__(self) -> str:
        return f"OnCuda({self.host})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of the pretended device")


class Generator(torch.Generator):
    """A random number generator that remembers its device."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        made.place = torch.device(device).type
        return made

    @property
    def device(self) -> torch.device:
        return CUDA if self.place == "cuda" else CPU


class Graph:
    """The ops of a step. They run once while they are recorded, in place of the first replay."""

    recording: Graph | None = None

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for call in self.calls if self.replays > 1 else ():
            call()

    @classmethod
    @contextmanager
    def capture(cls, graph: Graph, stream: Any = None) -> Iterator[None]:
        cls.recording = graph
        try:
            yield
        finally:
            cls.recording = None


def _on_host(x: Any) -> Any:
    return tree_map_only(OnCuda, lambda tensor: tensor.host, x)


def _on_cuda(x: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor if isinstance(tensor, OnCuda) else OnCuda(tensor), x)


class Ops(TorchDispatchMode):
    """Below autograd: computes on the host; results are on the device that they would be on with a GPU."""

    on_cuda = False  # tensors that C++ creates without inputs, in the current call, are created on the device

    @contextmanager
    def making_on(self, place: torch.device) -> Iterator[None]:
        outside, self.on_cuda = self.on_cuda, place.type == "cuda"
        try:
            yield
        finally:
            self.on_cuda = outside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        others = [x for x in tensors if not isinstance(x, OnCuda)]
        if len(others) == len(tensors) and (tensors or not self.on_cuda):
            return func(*args, **kwargs)
        _check(func, args, others)
        args_on_host, kwargs_on_host = _on_host(args), _on_host(kwargs)
        result = func(*args_on_host, **kwargs_on_host)
        if Graph.recording:
            Graph.recording.calls.append(lambda: _again(func, args_on_host, kwargs_on_host, result))
        arguments = func._schema.arguments
        in_place = bool(arguments and arguments[0].name == "self" and arguments[0].is_write)
        return args[0] if in_place and result is not None else _on_cuda(result)


def _check(func: Any, args: Any, others: list[torch.Tensor]) -> None:
    """Raise the error of a GPU; ``others`` are the tensors that are not on it."""
    waits = func in HOST_READS or (func in COPIES and bool(others))
    if func in INDEXED:
        waits = any(x is not None and (x.dtype == torch.bool or not isinstance(x, OnCuda)) for x in args[1])
        others = [x for x in (args[0], *args[2:3]) if not isinstance(x, OnCuda)]
    if func not in COPIES and any(x.dim() for x in others):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    if waits and Graph.recording:
        raise RuntimeError(f"{func}: expected a step that does not wait for the device")


def _again(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Run the op again, into the memory of its result; a view needs nothing."""
    for old, new in zip(tree_iter(result), tree_iter(func(*args, **kwargs)), strict=True):
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


class Calls(TorchFunctionMode):
    """Above autograd: removes the device from calls from Python, or torch would look for a real one."""

    def __init__(self, ops: Ops) -> None:
        super().__init__()
        self.ops = ops

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.backward:
            return self._backward(args[0])
        if func in (torch.Tensor.cuda, torch.Tensor.cpu):
            func, args = torch.Tensor.to, (args[0], func.__name__)
        on_cuda = any(isinstance(x, OnCuda) for x in tree_iter((args, kwargs)))
        place, explicit = kwargs.get("device"), kwargs.get("device") is not None
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], (str, torch.device)):
            place = args[1]
        place = CUDA if on_cuda and place is None else torch.device(place or "cpu")
        _check_generator(func, kwargs.get("generator"), place)
        if place.type == "meta":
            return func(*args, **kwargs)
        if func is torch.Tensor.to:
            return self._to(args, kwargs, place, on_cuda)
        if explicit:
            kwargs["device"] = CPU
        if kwargs.pop("pin_memory", False) and place.type != "cpu":
            raise RuntimeError(f"{func}: expected pinned memory on the host")
        if func is torch.tensor and place.type == "cuda" and Graph.recording:
            raise RuntimeError("torch.tensor: expected a step that does not wait for the device")
        if func in (torch.Tensor.tolist, torch.Tensor.new_tensor) or (on_cuda and place.type == "cpu"):
            made = func(*_on_host(args), **_on_host(kwargs))
        else:
            with self.ops.making_on(place):
                made = func(*args, **kwargs)
        return _on_cuda(made) if place.type == "cuda" and (explicit or func is torch.Tensor.new_tensor) else made

    def _backward(self, loss: torch.Tensor) -> None:
        """``Tensor.backward``, with its hooks and recomputations, which are calls from Python too."""
        with self, self.ops.making_on(loss.device):
            start = (loss,), (torch.ones_like(loss),)
            _engine_run_backward(*start, False, False, (), allow_unreachable=True, accumulate_grad=True)

    def _to(self, args: Any, kwargs: Any, place: torch.device, on_cuda: bool) -> torch.Tensor:
        """``Tensor.to``: the first argument may be a device; a change of device copies."""
        rest = [CPU if isinstance(x, (str, torch.device)) else x for x in args[1:]]
        kwargs = {**kwargs, **({"device": CPU} if kwargs.get("device") is not None else {})}
        if on_cuda == (place.type == "cuda"):
            return torch.Tensor.to(args[0], *rest, **kwargs)
        if Graph.recording:
            raise RuntimeError("Tensor.to: expected a step that does not wait for the device")
        copied = torch.Tensor.to(_on_host(args[0]).detach(), *rest, **{**kwargs, "copy": True})
        return OnCuda(copied) if place.type == "cuda" else copied


def _check_generator(func: Any, generator: Any, place: torch.device) -> None:
    if generator is not None and generator.device.type != place.type:
        raise RuntimeError(f"{func}: expected a generator on {place.type}, got one on {generator.device.type}")


@contextmanager
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, "cuda" is a device."""
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    event = SimpleNamespace(record=lambda stream: None, wait=lambda stream: None, synchronize=lambda: None)
    cuda = {
        "Stream": lambda device: stream,
        "Event": lambda: event,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "graph": Graph.capture,
        "get_rng_state": lambda device: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "mem_get_info": lambda device: (2**33, 2**33),
    }
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "Generator", Generator)
    keeps = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter becomes another tensor
    ops = Ops()
    try:
        with ops, Calls(ops):
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(keeps)
