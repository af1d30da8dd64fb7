"""Sampling from the transformer: guidance, image prompts, and the loop that draws one code of each image at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from .config import Sampling
from .ops import sample, waits_on_host

WARM_UP = 1  # steps that load kernels and reserve workspaces, which cannot be recorded
Decode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
ImagePrompt = tuple[torch.Tensor, torch.Tensor]  # codes [h, w], and a bool map [h, w] of those to keep


def guide(logits: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance: [2 C, K], with the caption and then without it -> [C, K]."""
    with_caption, without = logits.chunk(2)
    return without + guidance * (with_caption - without)


# ---------------------------------------------------------------------------------------------- image prompts


def leading(height: int, width: int, rows: int, columns: int) -> torch.Tensor:
    """Bool map [height, width] of the leading rows and columns, which an image prompt keeps."""
    for name, value, size in (("keep_rows", rows, height), ("keep_columns", columns, width)):
        if not 0 <= value < size:
            raise ValueError(f"{name}: expected 0 to {size - 1}, got {value}")
    return (torch.arange(height)[:, None] < rows) | (torch.arange(width) < columns)


def check_image_prompt(prompt: ImagePrompt, height: int, width: int, vocab: int) -> None:
    """Raise ValueError unless the prompt has codes of the model, and leaves a rectangle at the bottom right to draw."""
    codes, keep = prompt
    if codes.shape != (height, width) or codes.dtype != torch.int64:
        raise ValueError(f"image_prompt: expected int64 codes [{height}, {width}], got {codes.dtype} {[*codes.shape]}")
    if not 0 <= int(codes.min()) <= int(codes.max()) < vocab:
        raise ValueError(f"image_prompt: expected codes in [0, {vocab}), got {int(codes.min())} to {int(codes.max())}")
    if keep.shape != (height, width) or keep.dtype != torch.bool:
        raise ValueError(f"image_prompt: expected a bool map [{height}, {width}], got {keep.dtype} {[*keep.shape]}")
    fresh = (~keep).nonzero()
    if len(fresh) == 0 or keep[fresh[:, 0].min() :, fresh[:, 1].min() :].any():
        raise ValueError("image_prompt: expected to draw a rectangle with the bottom-right corner, got another shape")


# ---------------------------------------------------------------------------------------------- the loop


def draw_codes(
    decode: Decode,
    logits: torch.Tensor,
    steps: int,
    sampling: Sampling,
    guidance: float,
    prompt: ImagePrompt | None,
    every: int,
    prompts: int = 1,
) -> Iterator[torch.Tensor]:
    """Draw the codes of C images in raster order; yield those drawn so far, int64 [C, n], after each ``every`` codes.

    Args:
        decode: from the newest codes [R] at a raster index, an int64 scalar, to logits of the next codes [R, K]. R is
            C or, with guidance, 2 C: with the caption, then without.
        logits: of the first code, [R, K].
        steps: codes of an image, a multiple of ``every``.
        guidance: as in ``Sampling``, where None has been replaced by a number.
        prompt: codes to keep; None draws all.
        prompts: number of captions, each with C / prompts images in turn.

    Raises:
        RuntimeError: logits with NaN, or a row of them without a finite largest value.
    """
    vocab, device, guided = logits.shape[1], logits.device, guidance != 1.0
    seed = torch.tensor(sampling.seed, dtype=torch.int64, device=device)
    given, keep = prompt or (torch.zeros(steps, dtype=torch.int64), torch.zeros(steps, dtype=torch.bool))
    given, keep = given.flatten().to(device), keep.flatten().to(device)
    # The state between two steps, besides the caches in ``decode``.
    codes = torch.zeros(len(logits) // (1 + guided), steps, dtype=torch.int64, device=device)
    position = torch.zeros(1, dtype=torch.int64, device=device)  # of the newest codes

    def choose(logits: torch.Tensor) -> None:
        """Write the codes at ``position``."""
        if guided:
            logits = guide(logits, guidance)
        if logits.dtype == torch.float64:
            logits = logits.float()
        # The noise of an image depends on its place among those of its caption and on the step alone.
        draw = partial(
            sample, seed=seed, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p,
            first=position * vocab, pitch=steps * vocab,
        )  # fmt: skip
        parts = [draw(part) for part in logits.chunk(prompts)]
        drawn = torch.cat(parts) if prompts > 1 else parts[0]
        codes.index_copy_(1, position, torch.where(keep[position], given[position], drawn)[:, None])

    def step() -> None:
        """Feed the newest codes and choose the next ones; the host reads none of them."""
        newest = codes.index_select(1, position)[:, 0].clamp(min=0)  # -1 marks a row that nothing can be drawn from
        logits = decode(newest.repeat(2) if guided else newest, position[0])
        position.add_(1)
        choose(logits)

    choose(logits)
    # References read positions on the host, which a CUDA graph cannot record.
    on_graph = device.type == "cuda" and not any(waits_on_host(op, device) for op in ("decode_attention", "sample"))
    rest = Repeat(step, device if on_graph else None)
    for end in range(every, steps + 1, every):
        rest.run(every - 1 if end == every else every)
        if bool((codes < 0).any()):  # waits for the device
            raise RuntimeError("logits: expected no NaN and a finite largest value in every row of every step")
        yield codes[:, :end]


class Repeat:
    """A step of sampling, run many times. On a CUDA device it is recorded once as a CUDA graph, which is then replayed.

    Launching the kernels of a step one by one takes the host longer than the device needs to run them. The state
    between two steps is in tensors that exist before the first step and are written in place. A recorded step never
    waits for the device: no ``item()``, no branch on the value of a tensor.

    Args:
        step: the step.
        graph_on: the CUDA device; None calls the step each time.
    """

    def __init__(self, step: Callable[[], None], graph_on: torch.device | None = None) -> None:
        self._step = step
        self._device = graph_on
        self._stream = torch.cuda.Stream(graph_on) if graph_on is not None else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ran = 0

    def run(self, times: int) -> None:
        """Run the step so many times more."""
        if self._stream is None:
            for _ in range(times):
                self._step()
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(times):
                self._run_on_stream()
        self._stream.synchronize()  # before the results are read, or the graph is freed

    def _run_on_stream(self) -> None:
        if self._ran < WARM_UP:
            self._step()
        else:
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, stream=self._stream):
                    self._step()  # is recorded and does not run
            self._graph.replay()
        self._ran += 1
