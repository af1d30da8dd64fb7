"""Base class of the models: what training and distributed ask of a model instead of knowing its parameters' names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn


def check_images(images: torch.Tensor) -> None:
    """Raise ValueError unless all values are in [0, 1]; waits for a GPU."""
    low, high = images.aminmax() if images.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):  # not so for NaN either
        raise ValueError(f"images: expected values in [0, 1], got {float(low):.6g} to {float(high):.6g}")


class TrainableModel(nn.Module, ABC):
    """A model that can be trained in 16 bits, sharded, and compressed between nodes.

    Attributes:
        cfg: its sizes, a dataclass of ``dalle_fast.config``.
        trained_with: by name, the hashes of the parts of a system that it was trained with; empty if unknown.
        entry_points: methods beside ``forward`` that are called from outside and read parameters.
    """

    cfg: Any
    trained_with: dict[str, str]
    entry_points: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.trained_with = {}

    @abstractmethod
    def resblocks(self) -> list[tuple[str, nn.Module]]:
        """The resblocks in the order in which they run, each with its dotted name in the model."""

    def embeddings(self) -> set[nn.Parameter]:
        """The parameters that are tables of vectors, which do not decay: of ``nn.Embedding``, unless there are more."""
        return {parameter for m in self.modules() if isinstance(m, nn.Embedding) for parameter in m.parameters()}

    def stacked_matrices(self) -> Mapping[str, int]:
        """By name, the parameters that are several matrices below one another, and how many."""
        return {}
