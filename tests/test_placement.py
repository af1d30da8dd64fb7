"""Everything that a user runs on a GPU, on a pretended CUDA device, and on a real one if there is one.

The numbers are tested elsewhere: here, that tensors are on the right device, and that nothing waits where it must not.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import DEVICES
from helpers.pretend_cuda import Graph, pretended_cuda
from helpers.training import CLIP as CLIP_CFG
from helpers.training import DALLE as DALLE_CFG
from helpers.training import DVAE as DVAE_CFG
from helpers.training import KINDS, checkpoint, same, settings, task
from torch._subclasses.fake_tensor import FakeTensorMode

import dalle_fast as df
from dalle_fast.data.dedup import ExactNeighbours
from dalle_fast.models.codebook_init import init_codes
from dalle_fast.models.precision import Precision
from dalle_fast.ops import _library
from dalle_fast.pipeline import TextToImage
from dalle_fast.training import fit
from dalle_fast.training.scales import GradientScales

MASK = df.AttentionMask("conv", text_len=6, height=4, width=4, kernel=3)
HALF = [torch.float16, torch.bfloat16]
OPS_ON_CUDA = frozenset(vars(df.reference)) - {"pack_linear", "packed_linear"}
ALL_KERNELS = _library.Backend(("cpu", "cuda"), {}, cuda_ops=OPS_ON_CUDA)


@pytest.fixture(params=["pretended", *DEVICES[1:]])
def cuda(request, monkeypatch):
    """A CUDA device; True if it is a real one."""
    if request.param == "cuda":
        yield True
        return
    monkeypatch.setattr(_library, "_BACKEND", ALL_KERNELS)
    with pretended_cuda(monkeypatch):
        yield False


@pytest.fixture(params=["kernels", "references"])
def ops(request, cuda, monkeypatch):
    """Kernels or references on CUDA tensors: references, as long as a kernel was never run on a GPU."""
    if request.param == "references":
        monkeypatch.setattr(_library, "_BACKEND", _library.Backend(("cpu", "cuda"), {}))
    return request.param


def normal(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype).requires_grad_(grad)


def on_cuda(*results) -> bool:
    return all(x.device.type == "cuda" for x in results if isinstance(x, torch.Tensor))


# ---------------------------------------------------------------------------------------------- the device itself


def test_the_pretended_device_raises_as_a_gpu_would(monkeypatch):
    with pretended_cuda(monkeypatch):
        x, y = torch.ones(3, device="cuda"), torch.ones(3)
        assert (x * 2).tolist() == (x + torch.tensor(1)).tolist() == (x.cpu() + y).tolist() == [2, 2, 2]
        for mix in (lambda: x + y, lambda: torch.cat([x, y]), lambda: x.index_select(0, torch.tensor([0])), x.numpy):
            with pytest.raises(RuntimeError, match=r"same device|numpy"):
                mix()
        with pytest.raises(RuntimeError, match="expected a generator on cuda, got one on cpu"):
            torch.multinomial(x, 1, generator=torch.Generator())
        for wait in (x.sum().item, x.nonzero, x.cpu, lambda: x[x > 0], lambda: x.copy_(y), lambda: y.to("cuda")):
            wait()
            with pytest.raises(RuntimeError, match="that does not wait"), torch.cuda.graph(torch.cuda.CUDAGraph()):
                wait()


def test_the_pretended_device_replays_ops_but_not_python(monkeypatch):
    with pretended_cuda(monkeypatch):
        x, calls = torch.zeros(2, device="cuda"), []

        def step():
            calls.append(None)
            x.add_((x + 1).view(1, 2)[0] * len(calls))

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        for _ in range(3):
            graph.replay()
        assert x.tolist() == [7, 7] and len(calls) == 1


# ---------------------------------------------------------------------------------------------- ops


def attention():
    q, k, v = (normal(2, 2, 22, 8, dtype=torch.float16, grad=True) for _ in range(3))
    return [df.sparse_attention(q, k, v, MASK)], [q, k, v]


def decode():
    new, text = [normal(4, 2, 8) for _ in range(3)], [normal(2, 2, 6, 8) for _ in range(2)]
    caches = [normal(4, 2, MASK.cache_len, 8) for _ in range(2)]
    return [df.decode_attention(*new, *text, *caches, torch.tensor(3, device="cuda"), MASK)], []


def softmax():
    logits = normal(2, 16, 4, 4, grad=True)
    return df.gumbel_softmax(logits, 0.5, 1), [logits]


def quantize():
    logits, codebook = normal(2, 16, 4, 4, grad=True), normal(16, 8, grad=True)
    return df.gumbel_quantize(logits, codebook, 0.5, torch.tensor(1, device="cuda"))[:2], [logits, codebook]


def layer_norm():
    x, branch = normal(2, 3, 8, grad=True), normal(2, 3, 8, dtype=torch.float16, grad=True)
    weight, bias = normal(8, grad=True), normal(8, grad=True)
    scale, _, nonfinite = df.initial_scales(2, device="cuda")
    between = torch.float16, scale[0], scale[1], nonfinite[0]
    return df.residual_layer_norm(x, branch, weight, bias, 1e-5, *between), [x, branch, weight, bias]


def scales():
    scale, since_division, nonfinite = df.initial_scales(2, device="cuda")
    df.update_scales(scale, since_division, nonfinite)
    scaled = df.scale_gradient(normal(3), scale[0], torch.float16)
    return [scale, scaled, df.unscale_gradient(scaled, scale[0])], []


def optimizer():
    params, grads = [normal(3, 2)], [normal(3, 2)]
    moments = [[torch.zeros(3, 2, dtype=torch.int16, device="cuda")] for _ in range(2)]
    norm, skip = df.gradient_norm(grads)
    df.adamw16(params, grads, *moments, 1, 1e-3, 0.9, 0.96, 1e-8, 0.1, None, (4 / norm).clamp(max=1), skip)
    return [*params, norm, skip], []


def linear():
    weight = df.pack_linear(normal(20, 8), "int8")
    return [df.packed_linear(normal(3, 8), weight, normal(20))], []


def sample():
    return [df.sample(normal(3, 16), torch.tensor(1, device="cuda"), 0.9, 5, 0.9, first=torch.tensor(3))], []


OPS = [attention, decode, softmax, quantize, layer_norm, scales, optimizer, linear, sample]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_results_and_gradients_of_ops_are_on_the_device(op, ops):
    results, inputs = op()
    assert on_cuda(*results)
    if inputs:
        sum(result.float().sum() for result in results).backward()
        assert on_cuda(*(x.grad for x in inputs)) and all(x.grad.dtype == x.dtype for x in inputs)


@pytest.mark.parametrize("op", [attention, decode, softmax, quantize, optimizer, sample], ids=lambda op: op.__name__)
def test_fakes_are_on_the_device(op, monkeypatch):
    monkeypatch.setattr(_library, "_BACKEND", ALL_KERNELS)
    with FakeTensorMode(), torch.no_grad():
        results, _ = op()
        assert on_cuda(*results)


# ---------------------------------------------------------------------------------------------- models


def images(n: int = 4) -> torch.Tensor:
    return torch.rand(n, 3, 8, 8).to("cuda", memory_format=torch.channels_last)


def captions(n: int = 4) -> torch.Tensor:
    return torch.randint(270, (n, 6)).to("cuda")


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("dtype", [None, *HALF], ids=str)
def test_dvae(ops, dtype):
    dvae = df.DiscreteVAE(DVAE_CFG).to("cuda", memory_format=torch.channels_last)
    init_codes(dvae, images(32))
    loss, metrics = dvae.loss(images(), 0.5, 1.0, 7, dtype)
    loss.backward()
    assert on_cuda(loss, *metrics.values(), *gradients(dvae))
    codes = dvae.encode(images())
    assert on_cuda(codes, dvae.decode(codes))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [None, *HALF], ids=str)
def test_dalle(ops, dtype, recompute):
    model = df.DALLE(DALLE_CFG).to("cuda")
    scales = GradientScales([resblock for _, resblock in model.resblocks()], device="cuda") if dtype else None
    loss, parts = model.loss(captions(), torch.randint(16, (4, 4, 4)).to("cuda"), Precision(dtype, recompute, scales))
    loss.backward()
    assert on_cuda(loss, *parts.values(), *gradients(model))


def test_clip(cuda):
    model = df.CLIP(CLIP_CFG).to("cuda")
    loss, metrics = model.loss(images(), captions())
    loss.backward()
    assert on_cuda(loss, *metrics.values(), *gradients(model), model.eval().score(images(), captions(1)))


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("options", [{}, {"guidance": 2.0}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_sampling_is_one_recorded_step(cuda, monkeypatch, options, prompted):
    """The pretended device records it, draws the codes that the CPU draws, and refuses a step that waits."""
    torch.manual_seed(0)
    model, text, codes = df.DALLE(DALLE_CFG).eval(), captions(2).cpu(), torch.randint(16, (4, 4))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # so that every code depends on those before
    sampling, prompt = df.Sampling(**options, seed=1), (codes, torch.arange(16).view(4, 4) < 4) if prompted else None
    expected = model.generate(text, 3, sampling, prompt)
    replays = []
    monkeypatch.setattr(Graph, "replay", lambda graph, replay=Graph.replay: (replays.append(graph), replay(graph)))
    drawn = model.to("cuda").generate(text.to("cuda"), 3, sampling, prompt)
    assert on_cuda(drawn) and drawn.shape == expected.shape
    if not cuda:
        assert torch.equal(drawn.cpu(), expected)
        assert len(replays) == DALLE_CFG.image_len - 2 and len(set(replays)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_references_sample_too(ops, dtype):
    model = df.DALLE(DALLE_CFG).to("cuda", dtype)
    prompt = torch.randint(16, (4, 4)).to("cuda"), (torch.arange(16).view(4, 4) < 4).to("cuda")
    assert on_cuda(model.generate(captions(2), 3, df.Sampling(guidance=2.0), prompt))


@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8"])
def test_packed_weights(cuda, format):
    model = df.DALLE(DALLE_CFG).pack(format).to("cuda")
    assert on_cuda(model.generate(captions(1), 2))  # those of the CPU are no longer used
    assert on_cuda(model.pack(format).generate(captions(1), 2))


def test_text_to_image(cuda):
    pipe = TextToImage.load("tiny", device="cuda")
    image = np.zeros((32, 32, 3), np.uint8)
    result = pipe("a red circle", n=2, top=1, image_prompt=image, keep_rows=2)
    assert on_cuda(result.images, result.scores)


# ---------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("kind", KINDS)
def test_training(kind, cuda, tmp_path):
    """In 16 bits where that is the default, from a checkpoint, with validation and all else between steps."""
    for steps in (2, 3):
        config = settings(kind, steps=steps, save_every=2, device="cuda")
        model, metrics = fit(task(kind, config), config, tmp_path)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    assert metrics.keys() >= {"loss", "val_loss"} and metrics["skipped_updates"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_training_in_float32_is_that_of_the_cpu(kind, cuda, tmp_path):
    if cuda:
        pytest.skip("a GPU adds up in another order")
    precision = {"dvae": {"conv_dtype": "float32"}, "dalle": {"resblock_dtype": "float32"}, "clip": {}}[kind]
    for device in ("cpu", "cuda"):
        config = settings(kind, **precision, steps=4, device=device)
        fit(task(kind, config), config, tmp_path / device)
    expected, got = (checkpoint(tmp_path / device, kind) for device in ("cpu", "cuda"))
    assert same(*({name: values[name] for name in values if "/" in name} for values in (expected, got)))


def test_nearest_images(cuda):
    vectors = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    kept = ExactNeighbours(6, "cuda")
    kept.add(np.arange(6), vectors)
    assert kept.nearest(vectors)[0].tolist() == [*range(6)]
