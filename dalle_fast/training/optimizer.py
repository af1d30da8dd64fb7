"""AdamW whose moments take 16 bits where the paper's do (section 2.4, appendix D)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from ..distributed.sharding import local
from ..ops import adamw16
from ..ops._check import check_elements

MOMENTS = ("16-bit", "float32")
Group = dict[str, Any]
Tensors = list[torch.Tensor]


class AdamW16(torch.optim.Optimizer):
    """AdamW with decoupled decay, whose groups of parameters choose the format of their moments.

    ``moments="16-bit"``: the running mean is stored in 1-6-9 and the running variance in 0-6-10, clipped to 5: see
    :func:`dalle_fast.adamw16`, which updates the group. The paper does so for the matrices of resblocks.
    ``moments="float32"``: torch's fused AdamW, to the bit. The paper does so for gains, biases, embeddings and
    unembeddings.

    For a sharded parameter, the shard of this process is updated, and its state has the moments of the shard.

    Nothing is read back on the host. In a state dict ``exp_avg`` and ``exp_avg_sq`` are the moments; those in 16 bits
    are bit patterns, int16.

    Args:
        params: float32 parameters, or groups of them with options of their own.
        lr: step size, a number or a float32 tensor.
        betas, eps, weight_decay: as in ``torch.optim.AdamW``; the defaults are the paper's (appendix B.2).
        moments: ``16-bit`` or ``float32``.

    Raises:
        TypeError: a parameter of another dtype.
        ValueError: an option out of range.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[Group],
        lr: float | torch.Tensor = 4.5e-4,
        betas: tuple[float, float] = (0.9, 0.96),
        eps: float = 1e-8,
        weight_decay: float = 4.5e-2,
        moments: str = "16-bit",
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "moments": moments}
        super().__init__(params, options)

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, with the options in which they differ from the optimizer's defaults."""
        options = {**self.defaults, **param_group}
        if options["moments"] not in MOMENTS:
            raise ValueError(f"moments: expected one of {', '.join(MOMENTS)}, got {options['moments']}")
        for name in ("lr", "eps", "weight_decay"):
            if not options[name] >= 0:
                raise ValueError(f"{name}: expected a number of at least 0, got {options[name]}")
        if not all(0 <= beta < 1 for beta in options["betas"]):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {options['betas']}")
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.dtype != torch.float32:
                raise TypeError(f"params: expected torch.float32, got {parameter.dtype}")

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        unscale: torch.Tensor | None = None,
        clip: torch.Tensor | None = None,
        skip: torch.Tensor | None = None,
    ) -> Any:
        """One step of the n parameters that have a gradient, in the order of the groups.

        Gradients are left in place, but may be multiplied by the factors below.

        Args:
            closure: computes the loss and gradients anew.
            unscale: [n] float32, factor of each gradient: 1 over the scale of its resblock.
            clip: one float32, factor of every gradient, such as the limit over :func:`dalle_fast.gradient_norm`.
            skip: [n] bool, True for parameters that stay as they are, moments included.

        Returns:
            The result of the closure, or None.

        Raises:
            TypeError: an option of another dtype.
            ValueError: an option of another size or device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        n = sum(map(len, trained))
        if n == 0:
            return loss
        device = next(params[0].device for params in trained if params)
        check_elements("unscale", unscale, torch.float32, n, device)
        check_elements("clip", clip, torch.float32, 1, device)
        check_elements("skip", skip, torch.bool, n, device)
        counts = list(map(len, trained))
        parts = zip(self.param_groups, trained, _split(unscale, counts), _split(skip, counts), strict=True)
        for group, params, part_unscale, part_skip in parts:
            if params:
                update = self._update_16_bit if group["moments"] == "16-bit" else self._update_float32
                update(group, params, part_unscale, clip, part_skip)
        return loss

    def _update_16_bit(
        self,
        group: Group,
        params: Tensors,
        unscale: torch.Tensor | None,
        clip: torch.Tensor | None,
        skip: torch.Tensor | None,
    ) -> None:
        for p in params:
            if p not in self.state:
                shard = local(p)
                self.state[p] = {name: torch.zeros_like(shard, dtype=torch.int16) for name in ("exp_avg", "exp_avg_sq")}
        if "step" not in group:  # steps that changed any of its parameters, counted on the device
            group["step"] = torch.zeros((), dtype=torch.int64, device=params[0].device)
        group["step"] += 1 if skip is None else ~skip.all()
        beta1, beta2 = group["betas"]
        adamw16(
            [local(p) for p in params],
            _gradients(params),
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            group["step"],
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            unscale,
            clip,
            skip,
        )

    def _update_float32(
        self,
        group: Group,
        params: Tensors,
        unscale: torch.Tensor | None,
        clip: torch.Tensor | None,
        skip: torch.Tensor | None,
    ) -> None:
        for p in params:
            if p not in self.state:
                step, shard = torch.zeros((), dtype=torch.float32, device=p.device), local(p)
                self.state[p] = {name: torch.zeros_like(shard) for name in ("exp_avg", "exp_avg_sq")} | {"step": step}
        beta1, beta2 = group["betas"]
        # torch.optim.AdamW takes one divisor and one skip for all of its parameters. The function behind it takes them
        # per call: where they differ, each parameter has a call of its own.
        each = unscale is not None or skip is not None
        calls = [[p] for p in params] if each else [params]
        divisors: list[torch.Tensor | None] = [None] * len(calls)
        if unscale is not None or clip is not None:
            factor = (1.0 if unscale is None else unscale) * (1.0 if clip is None else clip.reshape(()))
            divisors = [*(1 / torch.as_tensor(factor)).expand(len(calls))]
        skips = [None] * len(calls) if skip is None else [*skip.float()]
        for some, divisor, skipped in zip(calls, divisors, skips, strict=True):
            states = [self.state[p] for p in some]
            adamw(
                [local(p) for p in some],
                _gradients(some),
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                grad_scale=divisor,
                found_inf=skipped,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of another optimizer, whose groups must have moments in the same formats.

        Raises:
            ValueError: other formats, or other groups.
        """
        expected, got = ([group.get("moments") for group in g] for g in (self.param_groups, state_dict["param_groups"]))
        if expected != got:
            raise ValueError(f"moments: expected groups with {expected}, got {got}")
        super().load_state_dict(state_dict)
        # torch has cast all moments to the dtype of their parameters, float32, which holds 16-bit patterns exactly.
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                for name in state:
                    state[name] = state[name].to(p.device, torch.int16 if group["moments"] == "16-bit" else None)
            if "step" in group:
                group["step"] = group["step"].to(group["params"][0].device)


def _split(x: torch.Tensor | None, counts: list[int]) -> Sequence[torch.Tensor | None]:
    return [None] * len(counts) if x is None else x.contiguous().split(counts)


def _gradients(params: Tensors) -> Tensors:
    return [local(p.grad) for p in params if p.grad is not None]
