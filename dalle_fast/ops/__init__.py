"""The ops: public function, fake and gradient of each; the kernels are in ``csrc/``."""

from ._library import Backend, backend

__all__ = ["Backend", "backend"]
