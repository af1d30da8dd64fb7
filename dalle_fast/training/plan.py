"""Resources of a training, before anything is allocated: memory by kind, FLOPs, and bytes between nodes.

As in the paper: shards inside a node and PowerSGD between nodes (section 2.5, appendix E), 16 bits (section 2.4,
appendix D), recompute of resblocks (appendix B). Activations are the tensors that autograd keeps, counted layer by
layer. A GB has 2^30 bytes, as in the memory of GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch

from ..config import CLIPConfig, DALLEConfig, DVAEConfig
from ..mask import AttentionMask, layer_masks
from ..models.base import TrainableModel
from ..models.precision import dtype_of
from .settings import TrainConfig, TrainDALLE, TrainDVAE

GB = 2**30
LONG, FLOAT, HALF = 8, 4, 2  # bytes
POWERSGD_RANKS = {1920: 512, 2688: 640, 3968: 896}  # by d_model (table 1)
MOST_GPUS = 64  # of a node, in the search for a plan that fits


@dataclass(frozen=True)
class Plan:
    """Bytes on one device, by kind; FLOPs and traffic of a step."""

    title: str
    memory: dict[str, float]
    available: float  # bytes of the device
    flops: float = 0.0  # of a step, all devices together; 0: not counted
    traffic: dict[str, float] = field(default_factory=dict)  # bytes that a node sends per step
    saved: dict[str, str] = field(default_factory=dict)  # by kind of traffic, how much less that is
    caches: dict[str, float] = field(default_factory=dict)  # bytes while sampling, not in the memory of training

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.available

    def __str__(self) -> str:
        unit, size_of_unit = ("GB", GB) if self.total >= GB else ("MB", GB / 1024)

        def line(kind: str, size: float, remark: str = "") -> str:
            return f"  {kind:32}{size / size_of_unit:10.2f} {unit}{remark}"

        verdict = "fits" if self.fits else "does not fit"
        lines = [self.title, *(line(kind, size) for kind, size in self.memory.items())]
        lines += [line("in all", self.total, f": {verdict} in {self.available / GB:.2f} GB")]
        if self.flops:
            lines += [f"  {'FLOPs of a step':32}{self.flops:10.3g}"]
        lines += [line(kind, size, f" per step{self.saved.get(kind, '')}") for kind, size in self.traffic.items()]
        lines += [line(kind, size, " to sample") for kind, size in self.caches.items()]
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- the transformer


def dalle_parameters(cfg: DALLEConfig) -> tuple[int, int]:
    """Numbers of parameters in matrices of resblocks, and in gains, biases and (un)embeddings."""
    d, text, image = cfg.d_model, cfg.text_vocab + cfg.text_len, cfg.image_vocab
    matrices = cfg.n_layer * 12 * d**2  # qkv 3, out 1, MLP 4 + 4
    vectors = cfg.n_layer * 13 * d  # biases 3 + 1 + 4 + 1, two LayerNorms 2 + 2
    embeddings = (text + cfg.text_len + image + cfg.height + cfg.width + 1) * d  # 1: start
    unembeddings = 2 * d + (d + 1) * (text + image)  # 2: the last LayerNorm
    return matrices, vectors + embeddings + unembeddings


@lru_cache
def attention_pairs(mask: AttentionMask) -> int:
    """Number of pairs of a query and a key that it sees, in one head."""
    return int(mask.dense().sum())


def dalle_flops(cfg: DALLEConfig, recompute: bool) -> int:
    """FLOPs of one sample: forward, backward at twice as many, and with ``recompute`` resblocks once more."""
    masks = layer_masks(cfg.n_layer, cfg.text_len, cfg.height, cfg.width, cfg.kernel)
    matrices, _ = dalle_parameters(cfg)
    resblocks = 2 * matrices * masks[0].seq_len + 4 * cfg.d_model * sum(map(attention_pairs, masks))
    text, image = cfg.text_len * (cfg.text_vocab + cfg.text_len), cfg.image_len * cfg.image_vocab
    return (4 if recompute else 3) * resblocks + 3 * 2 * cfg.d_model * (text + image)


def dalle_activations(cfg: DALLEConfig, recompute: bool, inside: int) -> int:
    """Bytes of one sample at the peak; a number takes ``inside`` bytes in resblocks, 4 elsewhere."""
    token = cfg.d_model * (cfg.text_len + cfg.image_len)  # one vector per token
    kept = cfg.n_layer * 2 * FLOAT * token  # input of each resblock
    # Inside: output of LayerNorm; qkv and output of attention, or the MLP's hidden layer before and after GELU.
    every = cfg.n_layer * ((1 + 3 + 1) + (1 + 4 + 4)) * inside * token
    one = (1 + 4 + 4 + 4) * inside * token  # an MLP, and the gradient of its hidden layer
    text, image = cfg.text_len * (cfg.text_vocab + cfg.text_len), cfg.image_len * cfg.image_vocab
    ends = 3 * FLOAT * token + 3 * FLOAT * (text + image)  # inputs of logits; logits, log-softmax and gradients
    return kept + (one if recompute else every) + ends


def dalle_caches(cfg: DALLEConfig, size: int) -> tuple[int, int]:
    """Bytes of keys and values while sampling, of a prompt and of each of its candidates; ``size`` bytes per number."""
    masks = layer_masks(cfg.n_layer, cfg.text_len, cfg.height, cfg.width, cfg.kernel)
    token = 2 * cfg.d_model * size
    return token * cfg.text_len * cfg.n_layer, token * sum(mask.cache_len for mask in masks)


def powersgd_saving(d_model: int, rank: int, gpus: int = 8) -> float:
    """Share of the bytes that PowerSGD saves; with 8 GPUs per node that of table 1.

    Like the table it counts the gradients of the resblocks' matrices alone, against sending these in 16 bits. All other
    gradients are sent whole, in float32, so that a node saves less of its whole traffic.

    A shard [n, k] takes rank / gpus * (n + k) numbers. Of q, k, v, out and the MLP's two, cut along their long sides,
    the short sides sum to 6 d_model, and the long ones to 12 d_model / gpus.
    """
    return 1 - (1 / 2 + 1 / gpus) * rank / d_model


def plan_paper(
    cfg: DALLEConfig, batch: int, gpus: int = 1, nodes: int = 1, memory: float = 16 * GB, rank: int | None = None
) -> Plan:
    """The paper's training of the transformer: one GPU of ``nodes`` nodes with ``gpus`` GPUs each.

    Matrices of resblocks, their gradients and their moments have 16 bits per number, all else has 32; every node holds
    them once, in equal shards. The running average is in the memory of the host.

    Args:
        batch: samples of a step, all GPUs together.
        memory: bytes of a GPU.
        rank: of PowerSGD, for a whole matrix; None is the paper's for this d_model, and no PowerSGD for any other.

    Raises:
        ValueError: a number below 1, or a batch that the GPUs cannot share equally.
    """
    sizes = {"batch": batch, "gpus": gpus, "nodes": nodes, "rank": 1 if rank is None else rank}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}: expected 1 or more, got {value}")
    if not memory > 0:
        raise ValueError(f"memory: expected more than 0, got {memory}")
    if batch % (gpus * nodes):
        raise ValueError(f"batch: expected a multiple of the {gpus * nodes} GPUs, got {batch}")
    matrices, rest = dalle_parameters(cfg)
    gradients = HALF * matrices + FLOAT * rest
    sent = 2 * (nodes - 1) / nodes  # by a node in an all-reduce, as a share of the bytes to reduce
    rank = POWERSGD_RANKS.get(cfg.d_model) if rank is None else rank
    layer = cfg.d_model**2 * HALF
    needed: dict[str, float] = {
        "parameters": (HALF * matrices + FLOAT * rest) / gpus,
        "gradients": gradients / gpus,  # with PowerSGD these are its error buffers
        "moments": 2 * (HALF * matrices + FLOAT * rest) / gpus,
        "activations": dalle_activations(cfg, recompute=True, inside=HALF) * (batch // (gpus * nodes)),
    }
    if gpus > 1:  # gathered: attention and MLP, one at work and one on its way; and the gradient of an MLP
        needed["gathered resblocks"] = (4 + 8 + 8) * layer
    traffic, saved = {}, {}
    if nodes > 1:
        traffic["all-reduce between nodes"] = sent * gradients
        if rank is not None:
            saving = powersgd_saving(cfg.d_model, rank, gpus)
            compressed = (1 - saving) * HALF * matrices
            needed["PowerSGD's P and Q"] = compressed / gpus
            name = f"with PowerSGD of rank {rank}"
            traffic[name] = sent * (compressed + FLOAT * rest)
            less = 1 - traffic[name] / (sent * gradients)
            saved[name] = f", {less:.0%} less; {saving:.0%} of the resblocks' matrices alone, as in table 1 for 8 GPUs"
    title = f"{matrices + rest:,} parameters on {nodes} x {gpus} GPUs, a batch of {batch}; each GPU holds"
    prompt, candidate = dalle_caches(cfg, HALF)
    caches = {"caches of a prompt": float(prompt), "caches of each candidate": float(candidate)}
    return Plan(title, needed, memory, batch * dalle_flops(cfg, recompute=True), traffic, saved, caches)


def what_fits(cfg: DALLEConfig, batch: int, gpus: int, nodes: int, memory: float, rank: int | None) -> str:
    """The nearest changes of one number with which ``plan_paper`` fits, in words."""

    def fits(batch: int = batch, gpus: int = gpus, nodes: int = nodes) -> bool:
        return batch % (gpus * nodes) == 0 and plan_paper(cfg, batch, gpus, nodes, memory, rank).fits

    ways = [f"a batch of {n}" for n in range(batch, 0, -1) if fits(batch=n)][:1]
    shares = [(n, max(1, gpus * nodes // n)) for n in range(gpus, MOST_GPUS + 1)]  # as many GPUs on fewer nodes
    ways += [f"{n} GPUs on each of {m} nodes" for n, m in shares if fits(gpus=n, nodes=m)][:1]
    ways += [f"{n} nodes" for n in range(nodes, batch // gpus + 1) if fits(nodes=n)][:1]
    needed = plan_paper(cfg, batch, gpus, nodes, memory, rank).total
    return ", or ".join([*ways, f"{needed / GB:.2f} GB per GPU"])


# ---------------------------------------------------------------------------------------------- a run on one device


def _tower_activations(width: int, layers: int, tokens: int) -> int:
    """Floats of one sample in a transformer of CLIP: as in ``dalle_activations``, plus the sigmoid of its GELU."""
    return layers * (2 + 1 + 3 + 1 + 1 + 4 + 4 + 4) * width * tokens


def clip_activations(cfg: CLIPConfig) -> int:
    """Bytes of one sample; the logits of a batch are negligible."""
    patches = (cfg.image_size // cfg.patch_size) ** 2 + 1
    vision = _tower_activations(cfg.vision_width, cfg.vision_layers, patches) + 3 * cfg.image_size**2
    return FLOAT * (vision + _tower_activations(cfg.text_width, cfg.text_layers, cfg.text_len))


def dvae_activations(cfg: DVAEConfig, inside: int) -> int:
    """Bytes of one sample; a number takes ``inside`` bytes between convolutions, 4 in logits and likelihood."""

    def stage(widths: list[int], sizes: list[int], pooled: bool) -> int:
        """Bytes in the resblocks from widths[0] through widths[1:], on maps of these edges in pixels."""
        kept = 0
        for before, after, size in zip(widths, widths[1:], sizes, strict=False):
            for n_in in [before] + [after] * (cfg.n_blk_per_group - 1):
                shortcut = n_in if n_in != after else 0  # input of its convolution
                kept += inside * (shortcut + n_in + 3 * (after // 4)) * size**2  # outputs of the ReLUs
            kept += pooled * (inside * after * size**2 + LONG * after * (size // 2) ** 2)  # pooling: input, indices
        return kept

    encoder = [cfg.n_hid] + [cfg.n_hid * multiple for multiple in cfg.groups]
    decoder = [cfg.n_init] + [cfg.n_hid * multiple for multiple in reversed(cfg.groups)]
    sizes = [cfg.image_size >> i for i in range(len(cfg.groups))]
    groups = stage(encoder, sizes, pooled=True) + stage(decoder, sizes[::-1], pooled=False)
    ends = FLOAT * encoder[-1] * cfg.grid**2 + inside * decoder[-1] * cfg.image_size**2  # outputs of the last ReLUs
    logits, pixels = cfg.vocab_size * cfg.grid**2, 3 * cfg.image_size**2
    return groups + ends + FLOAT * (2 * logits + 8 * pixels)  # logits and their gradient; likelihood of each value


def plan_run(
    model: TrainableModel,
    cfg: CLIPConfig | DALLEConfig | DVAEConfig,
    config: TrainConfig,
    available: float,
    shards: int = 1,
    processes: int = 1,
) -> Plan:
    """A training of this package, on one of its devices.

    Args:
        model: for its parameters' sizes; may be on the device "meta".
        cfg: its sizes.
        available: bytes of the device.
        shards: processes that share a copy of the parameters.
        processes: all that train together, each on a device of its own, and share a batch.
    """
    parameters = moments = 0
    inside = {parameter for _, resblock in model.resblocks() for parameter in resblock.parameters()}
    for parameter in model.parameters():
        parameters += parameter.numel()
        short = parameter.ndim >= 2 and parameter in inside and config.resblock_moments() == "16-bit"
        moments += 2 * (HALF if short else FLOAT) * parameter.numel()
    if isinstance(cfg, DALLEConfig) and isinstance(config, TrainDALLE):
        itemsize = dtype_of(config.resblock_dtype, config.device).itemsize
        activations = dalle_activations(cfg, config.recompute, itemsize)
        flops = config.batch_size * dalle_flops(cfg, config.recompute)
    elif isinstance(cfg, DVAEConfig) and isinstance(config, TrainDVAE):
        activations, flops = dvae_activations(cfg, dtype_of(config.conv_dtype, config.device).itemsize), 0
    else:
        activations, flops = clip_activations(cast(CLIPConfig, cfg)), 0
    needed: dict[str, float] = {
        "parameters": FLOAT * parameters / shards,
        "gradients": FLOAT * parameters / shards,
        "moments": moments / shards,
    }
    if torch.device(config.device).type == "cpu":  # elsewhere it is in the memory of the host
        needed["running average"] = FLOAT * parameters / shards
    if processes > 1:
        resblocks = [sum(p.numel() for p in resblock.parameters()) for _, resblock in model.resblocks()]
        # Of resblocks the current one, the next one, and a gradient; of all else the parameters and gradients.
        if config.compression_rank() and processes > shards and isinstance(cfg, DALLEConfig):
            needed["error buffers"] = HALF * dalle_parameters(cfg)[0] / shards
        needed["gathered parameters"] = FLOAT * (3 * max(resblocks) + 2 * (parameters - sum(resblocks)))
    needed["activations"] = activations * config.batch_size / config.accumulate / processes
    title = f"{parameters:,} parameters on {config.device}, a batch of {config.batch_size}; it needs"
    if processes > 1:
        title = f"{parameters:,} parameters on {processes} processes, a batch of {config.batch_size}; each needs"
    return Plan(title, needed, available, flops)


def refuse_what_cannot_fit(plan: Plan, batch_size: int, processes: int = 1, accumulate: int | None = None) -> None:
    """Raise ValueError, naming what would fit, unless the plan of a run fits.

    Args:
        processes: share the batch.
        accumulate: parts of a batch; None if it cannot be computed in parts.
    """
    if plan.fits:
        return
    each = batch_size // processes // (accumulate or 1)  # samples at a time
    per_sample = plan.memory["activations"] / each
    fitting = processes * int((plan.available - plan.total) / per_sample + each) if per_sample else 0
    what = f"a batch of {fitting}" if fitting > 0 else "a smaller model, or this one on more GPUs: see dalle-fast plan"
    if accumulate and fitting > 0:
        share = batch_size // processes
        parts = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= fitting // processes)
        what += f", or accumulate {parts}"
    raise ValueError(
        f"memory: expected at most {plan.available / GB:.2f} GB, got a training that needs {plan.total / GB:.2f} GB; "
        f"what would fit is {what}"
    )


def available_memory(device: torch.device) -> float:
    """Free bytes of a device; infinite if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="utf-8").splitlines() if meminfo.exists() else []
    sizes = [float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return sizes[0] if sizes and device.type == "cpu" else math.inf
