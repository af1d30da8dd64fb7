"""The paper's attention masks: the tokens that each token may attend to (section 2.2, appendix B.1).

A stream holds ``text_len`` text tokens followed by ``height * width`` image tokens in raster order.
Text sees earlier text and itself; every image token sees all text; the kind decides what it sees of the image:

=======  =========================================================================================
full     every earlier image token, and itself
row      itself and the ``width`` tokens before it in raster order
column   the tokens of its own column in rows up to its own
conv     the causal half of a ``kernel x kernel`` neighbourhood that wraps in raster order
=======  =========================================================================================

``conv`` follows the caption of figure 11d: "a causal convolutional attention pattern with wraparound behavior".
ru-dalle's transcription of that figure also has the wrapped diagonal one row further up, ``(kernel // 2 + 1) * width -
c`` tokens back for c from 1 to ``kernel // 2``. With a 3 x 3 kernel on a 4 x 4 grid, tokens see 0, 1, 3, 4 and 5 tokens
back here, and also 7 there. No ``kernel x kernel`` neighbourhood of a token contains these keys, so they are left out.

``AttentionMask.keep`` is the definition; ``csrc/common/mask.h``, which the kernels read, is tested against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

KINDS = ("full", "row", "column", "conv")


@dataclass(frozen=True)
class AttentionMask:
    """The geometry of one attention mask.

    Args:
        kind: one of ``full``, ``row``, ``column``, ``conv``.
        text_len: number of text tokens, at least 0.
        height, width: the image grid, in tokens; at least 1 each.
        kernel: edge of the ``conv`` neighbourhood in tokens, odd. Ignored by the other kinds.

    Raises:
        ValueError: an unknown kind or an impossible size.
    """

    kind: str
    text_len: int
    height: int
    width: int
    kernel: int = 11

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"mask kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.text_len < 0:
            raise ValueError(f"text_len: expected 0 or more, got {self.text_len}")
        if self.height < 1 or self.width < 1:
            raise ValueError(f"height and width: expected 1 or more, got {self.height} and {self.width}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel: expected a positive odd number, got {self.kernel}")

    @property
    def kind_id(self) -> int:
        """Number of the kind in ``csrc/common/mask.h``."""
        return KINDS.index(self.kind)

    @property
    def image_len(self) -> int:
        """Number of image tokens."""
        return self.height * self.width

    @property
    def seq_len(self) -> int:
        """Number of tokens in the stream."""
        return self.text_len + self.image_len

    @property
    def cache_len(self) -> int:
        """Number of image tokens that decoding must keep: the newest one and all that a later token may still see.

        ``row`` and ``conv`` only look back a bounded distance, so a ring of that many slots is enough.
        """
        if self.kind == "row":
            return min(self.width + 1, self.image_len)
        if self.kind == "conv":
            radius = self.kernel // 2
            reach = radius * self.width + min(2 * radius, self.width - 1) - radius
            return min(reach + 1, self.image_len)
        return self.image_len

    def keep(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """True where ``query`` sees ``key`` (appendix B.1); stream positions, int64, broadcast against each other."""
        back = query - key
        if self.kind == "full":
            window = back >= 0
        elif self.kind == "row":
            window = back <= self.width
        elif self.kind == "column":
            window = back % self.width == 0
        else:
            radius = self.kernel // 2
            shifted = back + radius
            window = (shifted // self.width <= radius) & (shifted % self.width <= 2 * radius)
        return (back >= 0) & ((key < self.text_len) | window)

    def dense(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The mask as a bool matrix [seq_len, seq_len], ``True`` where query (row) sees key (column).

        For tests, pictures and counts: no op builds it.
        """
        position = torch.arange(self.seq_len, device=device)
        return self.keep(position[:, None], position[None, :])

    def cache_slot(self, image_position: torch.Tensor) -> torch.Tensor:
        """Slot of the image token at ``image_position`` (raster index, int64) in the cache of decoding.

        Rings for ``row`` and ``conv``; column-major for ``column``, so that one column is contiguous; raster for
        ``full``.
        """
        if self.kind == "column":
            return image_position % self.width * self.height + image_position // self.width
        return image_position % self.cache_len


def layer_masks(n_layer: int, text_len: int, height: int, width: int, kernel: int = 11) -> tuple[AttentionMask, ...]:
    """The mask of every layer (appendix B.1): row, column, row, row, ... and ``conv`` in the last layer."""
    if n_layer < 1:
        raise ValueError(f"n_layer: expected 1 or more, got {n_layer}")

    def kind(layer: int) -> str:  # layer counts from 1, as in the paper
        if layer == n_layer:
            return "conv"
        return "column" if (layer - 2) % 4 == 0 else "row"

    return tuple(AttentionMask(kind(i), text_len, height, width, kernel) for i in range(1, n_layer + 1))
