"""A step of sampling, many times over."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP = 1  # steps that load kernels and reserve workspaces, which cannot be recorded


def repeat(step: Callable[[], None], times: int, graph_on: torch.device | None = None) -> None:
    """Run ``step`` so many times; on a CUDA device, record it once as a CUDA graph and replay that.

    Launching the kernels of a step one by one takes the host longer than the device needs to run them. What one step
    leaves to the next is in tensors that exist before the first and are written in place, and a recorded step never
    waits for the device: no ``item()``, no branch on the value of a tensor.
    """
    if graph_on is None:
        for _ in range(times):
            step()
        return
    stream = torch.cuda.Stream(graph_on)
    stream.wait_stream(torch.cuda.current_stream(graph_on))
    with torch.cuda.stream(stream):
        for _ in range(min(times, WARM_UP)):
            step()
        if times > WARM_UP:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                step()  # is recorded and does not run
            for _ in range(times - WARM_UP):
                graph.replay()
    stream.synchronize()  # before the graph is freed
