"""The plan of a training against measured models, and against the paper's own numbers."""

from dataclasses import replace

import pytest
import torch
from helpers.training import CLIP as CLIP_CFG
from helpers.training import DALLE as DALLE_CFG
from helpers.training import DVAE as DVAE_CFG
from helpers.training import Memory, settings

from dalle_fast.config import PRESETS, CLIPConfig, DVAEConfig
from dalle_fast.mask import KINDS, AttentionMask
from dalle_fast.models import CLIP, DALLE, DiscreteVAE
from dalle_fast.models.precision import Precision
from dalle_fast.training import dalle as training_dalle
from dalle_fast.training import plan
from dalle_fast.training.plan import (
    GB,
    attention_pairs,
    available_memory,
    dalle_caches,
    dalle_flops,
    dalle_parameters,
    plan_paper,
    plan_run,
    powersgd_saving,
    refuse_what_cannot_fit,
    what_fits,
)
from dalle_fast.training.scales import GradientScales

BIG = PRESETS["12B"].dalle


# ---------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_model(name):
    cfg = PRESETS[name].dalle
    with torch.device("meta"):
        model = DALLE(cfg)
    matrices, rest = dalle_parameters(cfg)
    assert matrices == sum(p.numel() for name, p in model.named_parameters() if "layers." in name and p.ndim == 2)
    assert matrices + rest == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(5, 4, 6, 3), (0, 3, 3, 11), (7, 9, 12, 5), (3, 1, 1, 3)])
def test_pairs_are_those_of_the_mask(kind, sizes):
    text_len, height, width, kernel = sizes
    mask = AttentionMask(kind, text_len, height, width, kernel)
    assert attention_pairs(mask) == mask.dense().sum()


def test_pairs_of_the_paper():
    pairs = {kind: attention_pairs(AttentionMask(kind, 256, 32, 32)) for kind in KINDS}
    assert pairs == {"row": 328_304, "column": 311_936, "conv": 352_209, "full": 819_840}


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    cfg = replace(DALLE_CFG, n_layer=1)
    model = DALLE(cfg)
    with FlopCounterMode(display=False) as counter:  # knows matrix products, not the op of attention
        model.loss(torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, 4, 4, dtype=torch.int64))[0].backward()
    attention = 3 * 4 * cfg.d_model * attention_pairs(model.layers[0].attn.mask)
    assert dalle_flops(cfg, recompute=False) == counter.get_total_flops() + attention


def test_recompute_adds_a_forward_of_the_resblocks():
    logits = 3 * 2 * BIG.d_model * (256 * 16_640 + 1_024 * 8_192)
    once = (dalle_flops(BIG, recompute=False) - logits) // 3
    assert dalle_flops(BIG, recompute=True) == 4 * once + logits


def measured(model: torch.nn.Module, loss) -> tuple[int, int]:
    """Bytes that are kept for the backward, and at the peak; but for parameters and, in the first, their gradients.

    On the device "meta", for which the code takes the ways of CUDA, nothing is computed.
    """
    with Memory(known=model.parameters()) as memory:
        value = loss(model)
        kept = memory.now
        value.backward()
    return kept, memory.peak


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "cfg", [DVAEConfig(), DVAEConfig(image_size=64, n_hid=64, groups=(1, 2), n_blk_per_group=1)], ids=["paper", "small"]
)
def test_activations_of_the_dvae(cfg, dtype, monkeypatch):
    monkeypatch.setattr(torch, "bincount", lambda codes, minlength: codes.new_zeros(minlength))  # counts nothing
    with torch.device("meta"):
        model, images = DiscreteVAE(cfg), torch.rand(4, 3, cfg.image_size, cfg.image_size)
    kept, peak = measured(model, lambda model: model.loss(images, 1.0, 1.0, 0, dtype)[0])
    planned = 4 * plan.dvae_activations(cfg, dtype.itemsize)
    assert kept < planned
    assert planned == pytest.approx(peak, rel=0.1)


def test_activations_of_clip():
    cfg = CLIPConfig(
        image_size=32, patch_size=8, vision_width=64, vision_layers=3, text_vocab=270, text_len=12, text_width=48,
        text_layers=3, head_dim=16, embed_dim=16,
    )  # fmt: skip
    images, text = torch.rand(16, 3, 32, 32), torch.zeros(16, 12, dtype=torch.int64)  # on "meta", attention is another
    kept, _ = measured(CLIP(cfg), lambda model: model.loss(images, text)[0])
    assert 16 * plan.clip_activations(cfg) == pytest.approx(kept, rel=0.15)


def transformer(n_layer: int, dtype: torch.dtype, recompute: bool) -> tuple[int, int, int, int]:
    """Measured of one with so many layers, and for how many activations and gradients the plan has room."""
    cfg = replace(PRESETS["1.2B"].dalle, n_layer=n_layer)
    with torch.device("meta"):
        model = DALLE(cfg)
        text = torch.zeros(4, cfg.text_len, dtype=torch.int64)
        codes = torch.zeros(4, cfg.height, cfg.width, dtype=torch.int64)
        scales = GradientScales([resblock for _, resblock in model.resblocks()])
    kept, peak = measured(model, lambda model: model.loss(text, codes, Precision(dtype, recompute, scales))[0])
    return kept, peak, 4 * plan.dalle_activations(cfg, recompute, dtype.itemsize), 4 * sum(dalle_parameters(cfg))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True])
def test_activations_of_the_transformer(dtype, recompute):
    few_kept, _, few_planned, _ = transformer(2, dtype, recompute)
    kept, peak, planned, gradients = transformer(12, dtype, recompute)
    assert planned - few_planned == pytest.approx(kept - few_kept, rel=0.01)  # of ten layers
    assert 0.8 * planned < peak < planned + gradients


def test_recompute_keeps_the_stream_alone():
    token = PRESETS["1.2B"].dalle.d_model * (256 + 1024)
    kept = [transformer(n_layer, torch.float16, recompute=True)[0] for n_layer in (2, 3)]
    assert kept[1] - kept[0] == pytest.approx(4 * 2 * 4 * token, rel=0.01)  # in float32, before both resblocks


def test_caches_are_those_that_sampling_makes():
    cfg = PRESETS["tiny"].dalle
    with torch.no_grad():
        _, caches = DALLE(cfg).prefill(torch.zeros(1, cfg.text_len, dtype=torch.int64), candidates=3)
    text = sum(x.nbytes for layer in caches for x in layer[:2])
    images = sum(x.nbytes for layer in caches for x in layer[2:])
    assert dalle_caches(cfg, 4) == (text, images // 3)


# ---------------------------------------------------------------------------------------------- the paper's training


@pytest.mark.parametrize(("d_model", "rank", "percent"), [(1920, 512, 83), (2688, 640, 85), (3968, 896, 86)])
def test_table_1(d_model, rank, percent):
    assert round(100 * powersgd_saving(d_model, rank)) == percent
    assert plan.POWERSGD_RANKS[d_model] == rank


def test_12_billion_parameters_fit_the_papers_gpus():
    paper = plan_paper(BIG, batch=1024, gpus=8, nodes=128)
    matrices, rest = dalle_parameters(BIG)
    assert paper.memory["parameters"] == (2 * matrices + 4 * rest) / 8
    assert paper.memory["moments"] == 2 * paper.memory["gradients"] == 2 * paper.memory["parameters"]
    assert paper.memory["activations"] > 128 * 4 * 1280 * 3968  # what each resblock starts from
    assert 14 * GB < paper.total <= 16 * GB
    assert paper.fits
    whole, compressed = paper.traffic.values()
    assert whole == 2 * 127 / 128 * 8 * paper.memory["gradients"]
    saved = 2 * 127 / 128 * 2 * matrices * powersgd_saving(3968, 896)
    assert compressed == pytest.approx(whole - saved)


def test_one_node_sends_nothing_and_one_gpu_gathers_nothing():
    alone = plan_paper(PRESETS["1.2B"].dalle, batch=8)
    assert alone.traffic == {}
    assert alone.memory.keys() == {"parameters", "gradients", "moments", "activations"}
    assert list(plan_paper(PRESETS["1.2B"].dalle, 8, 2, 2).traffic) == ["all-reduce between nodes"]
    assert list(plan_paper(PRESETS["1.2B"].dalle, 8, 2, 2, rank=256).traffic)[1] == "with PowerSGD of rank 256"


def test_what_would_fit_does_and_one_more_does_not():
    assert what_fits(BIG, 2048, 8, 128, 16 * GB, None).startswith(
        "a batch of 1024, or 16 GPUs on each of 64 nodes, or 256 nodes, or 18.1"
    )
    assert plan_paper(BIG, 1024, 8, 128).fits
    assert not plan_paper(BIG, 2048, 8, 128).fits
    assert plan_paper(BIG, 2048, 16, 64).fits
    assert plan_paper(BIG, 2048, 8, 256).fits
    small = what_fits(BIG, 1, 1, 1, GB, None)  # nothing but more memory helps
    assert small.endswith(" GB per GPU")
    assert "or" not in small


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch": 0}, "batch: expected 1 or more, got 0"),
        ({"gpus": 0}, "gpus: expected 1 or more, got 0"),
        ({"nodes": -1}, "nodes: expected 1 or more, got -1"),
        ({"rank": 0}, "rank: expected 1 or more, got 0"),
        ({"memory": float("nan")}, "memory: expected more than 0, got nan"),
        ({"gpus": 3}, "batch: expected a multiple of the 3 GPUs, got 1024"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        plan_paper(BIG, **{"batch": 1024, **sizes})


def test_the_command_prints_the_plan(cli, capsys):
    command = ["plan", "--preset", "12B", "--gpus", "8", "--nodes", "128"]
    assert cli.main([*command, "--batch", "1024"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("12B: 12,293,853,056 parameters on 128 x 8 GPUs, a batch of 1024")
    assert "in all                               15.36 GB: fits in 16.00 GB" in said
    assert "FLOPs of a step" in said
    assert "with PowerSGD of rank 896             7.80 GB per step, 83% less; 86% of the resblocks' matrices" in said
    assert "caches of each candidate              0.27 GB to sample" in said
    assert cli.main([*command, "--memory", "12"]) == 2
    said = capsys.readouterr()
    assert "does not fit in 12.00 GB" in said.out
    assert "what would fit is 16 GPUs on each of 64 nodes, or 15.36 GB per GPU" in said.err


# ---------------------------------------------------------------------------------------------- a run on one device


def test_the_plan_of_a_run_counts_its_tensors():
    config = settings("dalle", batch_size=5)
    run = plan_run(DALLE(DALLE_CFG), DALLE_CFG, config, GB)
    matrices, rest = dalle_parameters(DALLE_CFG)
    assert run.memory["parameters"] == run.memory["gradients"] == run.memory["running average"] == 4 * (matrices + rest)
    assert run.memory["moments"] == 2 * (2 * matrices + 4 * rest)
    assert run.memory["activations"] == 5 * plan.dalle_activations(DALLE_CFG, recompute=True, inside=4)
    assert run.flops == 5 * dalle_flops(DALLE_CFG, recompute=True)
    config = settings("dalle", batch_size=5, recompute=False, resblock_dtype="bfloat16")
    run = plan_run(DALLE(DALLE_CFG), DALLE_CFG, config, GB)
    assert run.memory["activations"] == 5 * plan.dalle_activations(DALLE_CFG, recompute=False, inside=2)
    config = settings("dvae")
    run = plan_run(DiscreteVAE(DVAE_CFG), DVAE_CFG, config, GB)
    assert run.memory["moments"] == 2 * run.memory["parameters"]
    assert run.memory["activations"] == 4 * plan.dvae_activations(DVAE_CFG, inside=4)
    on_cuda = plan_run(DiscreteVAE(DVAE_CFG), DVAE_CFG, settings("dvae", device="cuda"), GB)
    assert "running average" in run.memory.keys() - on_cuda.memory.keys()  # there it is in the memory of the host
    assert on_cuda.memory["activations"] == 4 * plan.dvae_activations(DVAE_CFG, inside=2)


def test_a_run_that_cannot_fit_names_the_batch_that_does():
    config = settings("clip", batch_size=8)
    model = CLIP(CLIP_CFG)
    fixed = plan_run(model, CLIP_CFG, config, GB).total - 8 * plan.clip_activations(CLIP_CFG)
    available = fixed + 5 * plan.clip_activations(CLIP_CFG)
    tight = plan_run(model, CLIP_CFG, config, available)
    with pytest.raises(ValueError, match=r"what would fit is a batch of 5$"):
        refuse_what_cannot_fit(tight, 8)
    assert plan_run(model, CLIP_CFG, settings("clip", batch_size=5), available).fits
    with pytest.raises(ValueError, match="what would fit is a smaller model, or this one on more GPUs"):
        refuse_what_cannot_fit(plan_run(model, CLIP_CFG, config, fixed / 2), 8)


def test_training_says_what_it_needs_and_refuses_before_it_allocates(monkeypatch, capsys):
    config = settings("dalle")
    training_dalle.check_memory(DALLE, DALLE_CFG, config)
    assert "parameters on cpu, a batch of 4; it needs" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"memory: expected at most .* GB, got a training that needs"):
        training_dalle.train_dalle(None, None, None, replace(BIG, d_model=128_000), config, "nowhere")


def test_memory_of_this_computer():
    assert 2**20 < available_memory(torch.device("cpu")) < 2**60


def test_the_plan_of_many_processes_counts_their_shards():
    config = settings("dalle", batch_size=8, powersgd_rank=2)
    model = DALLE(DALLE_CFG)
    alone, many = plan_run(model, DALLE_CFG, config, GB), plan_run(model, DALLE_CFG, config, GB, shards=2, processes=4)
    for name in ("parameters", "gradients", "moments", "running average"):
        assert many.memory[name] == alone.memory[name] / 2
    assert many.memory["activations"] == alone.memory["activations"] / 4
    matrices, rest = dalle_parameters(DALLE_CFG)
    d, n = DALLE_CFG.d_model, DALLE_CFG.n_layer
    inside = matrices + n * 9 * d  # with the biases; LayerNorms are in front of resblocks
    assert many.memory["gathered parameters"] == 4 * (3 * (8 * d**2 + 5 * d) + 2 * (matrices + rest - inside))
    assert many.memory["error buffers"] == 2 * matrices / 2
    assert many.flops == alone.flops
    fixed = many.total - many.memory["activations"]
    tight = plan_run(model, DALLE_CFG, config, fixed + many.memory["activations"] * 0.6, shards=2, processes=4)
    with pytest.raises(ValueError, match="what would fit is a batch of 4"):
        refuse_what_cannot_fit(tight, 8, 4)


def test_a_batch_in_parts_needs_the_memory_of_one_part():
    model, config = DALLE(DALLE_CFG), settings("dalle", batch_size=12)
    whole, parts = (plan_run(model, DALLE_CFG, replace(config, accumulate=n), GB) for n in (1, 3))
    assert parts.memory["activations"] == whole.memory["activations"] / 3
    available = whole.total - whole.memory["activations"] * 0.6  # room for 4.8 of 12 samples
    for accumulate in (1, 2):
        tight = plan_run(model, DALLE_CFG, replace(config, accumulate=accumulate), available)
        with pytest.raises(ValueError, match=r"what would fit is a batch of 4, or accumulate 3$"):
            refuse_what_cannot_fit(tight, 12, accumulate=accumulate)
    assert plan_run(model, DALLE_CFG, replace(config, accumulate=3), available).fits
