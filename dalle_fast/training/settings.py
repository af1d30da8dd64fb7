"""Settings of training: frozen dataclasses whose defaults are the paper's values. Nothing here imports torch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from .schedules import Plateau, cosine, warmup

Moments = Literal["16-bit", "float32"]  # format of the optimizer's running averages, see optimizer.py
DType = Literal["auto", "float16", "bfloat16", "float32"]  # auto: float16 on CUDA, float32 on a CPU


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ABC):
    """Settings of every training. The subclasses add their own, and the schedule of the step size."""

    steps: int
    batch_size: int  # samples of a step, all processes together
    lr: float  # at its peak
    betas: tuple[float, float]
    eps: float
    weight_decay: float  # of matrices and filters only
    clip_norm: float  # limit of the norm of the whole gradient; 0 does not clip
    ema_decay: float
    ema_every: int  # steps
    seed: int = 0
    workers: int = 0  # processes that prepare data; 0 prepares it in this one
    log_every: int = 100  # steps
    val_every: int = 5_000  # steps; the last step is always followed by a validation
    val_samples: int = 1_024
    save_every: int = 5_000  # steps; a killed run loses those since the last checkpoint on the disk
    keep_checkpoints: int = 2  # the newest
    tensorboard: bool = False  # event files beside the log
    device: str = "cpu"
    parallel: Literal["fsdp", "ddp"] = "fsdp"  # processes of a node share the parameters, or each has them all
    warmup_steps: int = 0  # steps of linear growth of the step size
    accumulate: int = 1  # parts of a batch, whose gradients are summed; only one part needs memory at a time

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "ema_every", "log_every", "val_every", "val_samples", "save_every")
        for name in (*counts, "keep_checkpoints", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("workers", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate: expected a divisor of batch_size {self.batch_size}, got {self.accumulate}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 or more and below 2^63, got {self.seed}")
        self._expect_finite("lr", "weight_decay", "clip_norm")
        self._expect_finite("eps", above_0=True)
        for name, decay in (("ema_decay", self.ema_decay), *(("betas", beta) for beta in self.betas)):
            if not 0 <= decay < 1:
                raise ValueError(f"{name}: expected 0 or more and below 1, got {getattr(self, name)}")

    def _expect_finite(self, *names: str, above_0: bool = False) -> None:
        """Raise ValueError for a setting that is negative, infinite or NaN."""
        for name in names:
            value = getattr(self, name)
            if not (0 < value < math.inf if above_0 else 0 <= value < math.inf):
                expected = "a finite number above 0" if above_0 else "a finite number of 0 or more"
                raise ValueError(f"{name}: expected {expected}, got {value}")

    @abstractmethod
    def lr_at(self, step: int) -> float:
        """Step size of a step, before any halving on a plateau."""

    def lr_shares(self) -> dict[str, float]:
        """Factors of the step size for parts of the model, by the name of the submodule; 1 for the rest."""
        return {}

    def resblock_moments(self) -> Moments:
        """Format of the moments of the matrices in resblocks; all others are float32."""
        return "float32"

    def plateau(self) -> Plateau | None:
        """The rule that halves the step size on a plateau of the loss, if any."""
        return None

    def compression_rank(self) -> int | None:
        """Rank to which PowerSGD compresses the gradients between nodes, if it does."""
        return None


@dataclass(frozen=True, kw_only=True)
class TrainDVAE(TrainConfig):
    """Stage 1 (section 2.1, appendix A.2). The cosine schedules of a short run need short horizons."""

    steps: int = 3_000_000
    batch_size: int = 512
    lr: float = 1e-4
    lr_end: float = 1.25e-6
    lr_steps: int = 1_200_000
    tau: float = 1.0  # temperature of the relaxation
    tau_end: float = 1 / 16
    tau_steps: int = 150_000
    beta: float = 0.0  # weight of the KL
    beta_end: float = 6.6
    beta_steps: int = 5_000
    init_codes: bool = False  # start the codes at patches of the data, see models/codebook_init.py
    grain: float = 0.0  # standard deviation of noise on the pixels, without which flat areas have unbounded likelihood
    encoder_lr: float = 1.0  # step size of the encoder, as a share of lr
    conv_dtype: DType = "auto"  # of the convolutions; in float16 the loss is scaled
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    clip_norm: float = 0.0
    ema_decay: float = 0.999
    ema_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_finite("lr_end", "beta", "beta_end", "grain", "encoder_lr")
        self._expect_finite("tau", "tau_end", above_0=True)
        for name in ("lr_steps", "tau_steps", "beta_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")

    def lr_at(self, step: int) -> float:
        return warmup(step, self.warmup_steps) * cosine(step, self.lr, self.lr_end, self.lr_steps)

    def lr_shares(self) -> dict[str, float]:
        return {"encoder": self.encoder_lr}

    def tau_at(self, step: int) -> float:
        return cosine(step, self.tau, self.tau_end, self.tau_steps)

    def beta_at(self, step: int) -> float:
        return cosine(step, self.beta, self.beta_end, self.beta_steps)


@dataclass(frozen=True, kw_only=True)
class TrainCLIP(TrainConfig):
    """The reranker (arXiv 2103.00020, table 18 and ViT-B/32): linear warm-up, then a cosine to 0."""

    steps: int = 390_000
    batch_size: int = 32_768
    lr: float = 5e-4
    warmup_steps: int = 2_000
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2
    clip_norm: float = 0.0
    ema_decay: float = 0.999
    ema_every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 2:
            raise ValueError(f"batch_size: expected 2 or more, to tell one from another, got {self.batch_size}")
        if self.accumulate > 1:
            raise ValueError(
                f"accumulate: expected 1, as the loss of CLIP needs the whole batch at once, got {self.accumulate}"
            )

    def lr_at(self, step: int) -> float:
        return warmup(step, self.warmup_steps) * cosine(step, self.lr, 0.0, self.steps)


@dataclass(frozen=True, kw_only=True)
class TrainDALLE(TrainConfig):
    """Stage 2 (section 2.2, appendix B.2): warm-up, then halvings on plateaus; short runs take a cosine."""

    steps: int = 430_000
    batch_size: int = 1_024
    lr: float = 4.5e-4
    warmup_steps: int = 5_000
    lr_schedule: Literal["plateau", "cosine"] = "plateau"
    plateau_window: int = 1_000  # steps whose mean loss is compared
    plateau_patience: int = 10  # windows without gain before a halving
    bpe_dropout: bool = True  # captions are tokenized differently each time they are seen
    caption_dropout: float = 0.0  # share of captions replaced by the empty one, which guidance needs
    resblock_dtype: DType = "auto"  # of activations and gradients inside resblocks
    skip_overflow: Literal["step", "resblock"] = "step"  # what is skipped for an Inf or NaN gradient in a resblock
    recompute: bool = True  # run resblocks again in the backward, and keep only the stream
    powersgd_rank: int | None = None  # compress gradients of resblocks between nodes; a multiple of a node's processes
    moments: Moments = "16-bit"  # of the matrices in resblocks; all others are float32
    betas: tuple[float, float] = (0.9, 0.96)
    eps: float = 1e-8
    weight_decay: float = 4.5e-2
    clip_norm: float = 4.0
    ema_decay: float = 0.99
    ema_every: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("plateau_window", "plateau_patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout: expected a share in [0, 1], got {self.caption_dropout}")
        if self.powersgd_rank is not None and self.powersgd_rank < 1:
            raise ValueError(f"powersgd_rank: expected 1 or more, or none, got {self.powersgd_rank}")
        if self.powersgd_rank is not None and self.accumulate > 1:
            raise ValueError(f"accumulate: expected 1 with PowerSGD, got {self.accumulate}")

    def lr_at(self, step: int) -> float:
        peak = self.lr if self.lr_schedule == "plateau" else cosine(step, self.lr, 0.0, self.steps)
        return warmup(step, self.warmup_steps) * peak

    def resblock_moments(self) -> Moments:
        return self.moments

    def plateau(self) -> Plateau | None:
        return Plateau(self.plateau_window, self.plateau_patience) if self.lr_schedule == "plateau" else None

    def compression_rank(self) -> int | None:
        return self.powersgd_rank


@dataclass(frozen=True)
class TrainPreset:
    """Training settings of the three models of a system; the defaults are the papers'."""

    dvae: TrainDVAE = TrainDVAE()
    clip: TrainCLIP = TrainCLIP()
    dalle: TrainDALLE = TrainDALLE()


# By the same names as the models' sizes in dalle_fast.config. "tiny" is for minutes on two cores.
TRAIN_PRESETS: dict[str, TrainPreset] = {
    "tiny": TrainPreset(
        TrainDVAE(
            steps=2_500, batch_size=16, lr=3e-3, lr_steps=2_500, warmup_steps=100, encoder_lr=0.1, tau=0.5,
            tau_steps=2_500, beta=1.0, beta_end=1.0, init_codes=True, grain=0.1, clip_norm=1.0, ema_decay=0.99,
            val_every=500, val_samples=256, save_every=500,
        ),
        TrainCLIP(
            steps=1_000, batch_size=128, lr=1e-3, warmup_steps=100, weight_decay=0.1, clip_norm=1.0, ema_decay=0.99,
            val_every=500, val_samples=512, save_every=500,
        ),
        TrainDALLE(
            steps=1_500, batch_size=32, lr=1.5e-3, warmup_steps=100, lr_schedule="cosine", caption_dropout=0.1,
            bpe_dropout=False, recompute=False, clip_norm=1.0, ema_decay=0.9, ema_every=5, val_every=500,
            val_samples=512, save_every=500,
        ),
    ),
    **{name: TrainPreset() for name in ("1.2B", "2.8B", "5.6B", "12B")},
}  # fmt: skip
