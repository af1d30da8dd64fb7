"""Base class of the models: what training and distributed ask of a model instead of knowing its parameters' names."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import nn


class TrainableModel(nn.Module, ABC):
    """A model that can be trained in 16 bits, sharded, and compressed between nodes.

    Attributes:
        cfg: its sizes, a dataclass of ``dalle_fast.config``.
        trained_with: by name, the hashes of the parts of a system that it was trained with; empty if unknown.
        entry_points: methods beside ``forward`` that are called from outside and read parameters.
    """

    cfg: Any
    trained_with: Mapping[str, str] = MappingProxyType({})
    entry_points: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def resblocks(self) -> list[tuple[str, nn.Module]]:
        """The resblocks in the order in which they run, each with its dotted name in the model."""

    def embeddings(self) -> set[nn.Parameter]:
        """The parameters that are tables of vectors, which do not decay: of ``nn.Embedding``, unless there are more."""
        return {parameter for m in self.modules() if isinstance(m, nn.Embedding) for parameter in m.parameters()}

    def stacked_matrices(self) -> Mapping[str, int]:
        """By name, the parameters that are several matrices below one another, and how many."""
        return {}
