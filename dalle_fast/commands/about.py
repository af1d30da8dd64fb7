"""Commands that report: about this install, and about a training before and after it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..config import PRESETS
from ..training.settings import TRAIN_PRESETS
from .common import Preset


def plot(out: Annotated[Positional[Path], arg(metavar="FOLDER")]) -> None:
    """Plot the losses of a system's trainings, and the gradient scales of one in 16 bits.

    Args:
        out: Folder of the system; the plots go there too.
    """
    from ..figures import plot_logs

    print(*plot_logs(out), sep="\n")


def plan(
    preset: Preset = "tiny",
    gpus: int = 1,
    nodes: int = 1,
    batch: int | None = None,
    memory: float = 16.0,
    rank: int | None = None,
) -> None:
    """Plan the training of a transformer as in the paper: memory, FLOPs and traffic per GPU. Fails if it does not fit.

    Args:
        gpus: GPUs per node; they share the parameters.
        nodes: Number of nodes; each has all parameters, and they exchange gradients.
        batch: Samples per step on all GPUs together; none is the preset's.
        memory: Memory per GPU in GB.
        rank: Rank of PowerSGD between nodes; none is the paper's.
    """
    from ..training.plan import GB, plan_paper, what_fits

    cfg = PRESETS[preset].dalle
    batch = TRAIN_PRESETS[preset].dalle.batch_size if batch is None else batch
    planned = plan_paper(cfg, batch, gpus, nodes, memory * GB, rank)
    print(f"{preset}: {planned}")
    if not planned.fits:
        ways = what_fits(cfg, batch, gpus, nodes, memory * GB, rank)
        got = f"{planned.total / GB:.2f} GB"
        raise ValueError(f"memory: expected a plan that fits, got one of {got}; what would fit is {ways}")


def info() -> None:
    """Print versions, available kernels, and the number of parameters of each preset."""
    import torch

    from ..models import CLIP, DALLE, DiscreteVAE
    from ..ops import backend

    print(f"python {platform.python_version()}, {platform.platform()}, {torch.get_num_threads()} threads")
    for package in ("dalle-fast", "torch", "numpy", "tokenizers", "safetensors", "pillow"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} not installed as a package")
    print(f"kernels:\n  {str(backend()).replace(chr(10), chr(10) + '  ')}")
    print(f"{'preset':8}{'dvae':>16}{'clip':>16}{'dalle':>18}  parameters")
    for name, cfg in PRESETS.items():
        with torch.device("meta"):
            models = (DiscreteVAE(cfg.dvae), CLIP(cfg.clip), DALLE(cfg.dalle))
        dvae, clip, dalle = (sum(p.numel() for p in model.parameters()) for model in models)
        print(f"{name:8}{dvae:>16,}{clip:>16,}{dalle:>18,}")
