"""The prior: what each token may see, sizes, and sampling with caches as the same model."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import dalle_fast as df
from dalle_fast import sampling
from dalle_fast.config import PRESETS, DALLEConfig, Sampling
from dalle_fast.models import DALLE
from dalle_fast.models.transformer import Layer
from dalle_fast.sampling import Repeat, draw_codes, guide, leading

SMALL = DALLEConfig(
    text_vocab=20, text_len=5, image_vocab=13, height=4, width=4, d_model=32, n_layer=4, head_dim=16, kernel=3
)


def small_model(cfg: DALLEConfig = SMALL) -> DALLE:
    """A model whose weights are large enough for every token to matter."""
    torch.manual_seed(0)
    model = DALLE(cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def model_under(kind: str) -> DALLE:
    """The small model with one mask in every layer, or with the paper's schedule."""
    model = small_model()
    if kind != "paper":
        for layer in model.layers:
            layer.attn.mask = df.AttentionMask(kind, SMALL.text_len, 4, 4, kernel=3)
    return model


def small_batch(b: int = 2, cfg: DALLEConfig = SMALL) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(cfg.text_vocab, (b, cfg.text_len), generator=generator)
    return text, torch.randint(cfg.image_vocab, (b, cfg.height, cfg.width), generator=generator)


@pytest.mark.parametrize("name,billions", [("1.2B", 1.2), ("2.8B", 2.9), ("5.6B", 5.7), ("12B", 12.3)])
def test_preset_sizes(name, billions):
    with torch.device("meta"):
        model = DALLE(PRESETS[name].dalle)
    assert len(model.layers) == 64
    d = PRESETS[name].dalle.d_model
    layer = 12 * d * d + 13 * d  # two norms, four matrices of attention, two of the MLP, their biases
    tables = (16384 + 256 + 8192) * 2 * d + 16384 + 256 + 8192 + (256 + 32 + 32) * d + 3 * d
    count = sum(p.numel() for p in model.parameters())
    assert count == 64 * layer + tables
    assert round(count / 1e9, 1) == billions


def test_layer_masks_follow_the_paper():
    masks = [layer.attn.mask.kind for layer in small_model().layers]
    assert masks == ["row", "column", "row", "conv"]


def logits_stream(model: DALLE, text: torch.Tensor, codes: torch.Tensor) -> list[torch.Tensor]:
    """The logits of every token in stream order, one row a token."""
    with torch.no_grad():
        logits_text, logits_image = model(text, codes)
    return [*logits_text[0], *logits_image[0]]


@pytest.mark.parametrize("kind", ["full", "row", "column", "conv", "paper"])
def test_no_token_changes_what_predicts_it_or_earlier_ones(kind):
    model = model_under(kind)
    text, codes = small_batch(1)
    before = logits_stream(model, text, codes)
    for i in range(len(before)):
        changed_text, changed_codes = text.clone(), codes.clone()
        if i < SMALL.text_len:
            changed_text[0, i] = (text[0, i] + 1) % SMALL.text_vocab
        else:
            changed_codes.view(-1)[i - SMALL.text_len] = (codes.view(-1)[i - SMALL.text_len] + 1) % SMALL.image_vocab
        after = logits_stream(model, changed_text, changed_codes)
        assert all(torch.equal(a, b) for a, b in zip(before[: i + 1], after[: i + 1], strict=True)), i
        if i + 1 < len(before):
            assert not torch.equal(before[i + 1], after[i + 1]), f"token {i} does not reach the next one"


def test_every_image_token_depends_on_all_text():
    model = small_model()
    text, codes = small_batch(1)
    before = logits_stream(model, text, codes)[SMALL.text_len :]
    for i in range(SMALL.text_len):
        changed = text.clone()
        changed[0, i] = (text[0, i] + 1) % SMALL.text_vocab
        after = logits_stream(model, changed, codes)[SMALL.text_len :]
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), i


@pytest.mark.parametrize("kind", ["full", "row", "column", "conv", "paper"])
def test_cached_equals_uncached(kind):
    model = model_under(kind)
    text, _ = small_batch(2)
    candidates = 3
    _, codes = small_batch(2 * candidates)
    expected = model(text.repeat_interleave(candidates, 0), codes)[1]
    with torch.no_grad():
        logits, caches = model.prefill(text, candidates)
        steps = [logits.repeat_interleave(candidates, 0)]
        for i in range(SMALL.image_len - 1):
            steps.append(model.decode(codes.flatten(1)[:, i], torch.tensor(i), caches))
    torch.testing.assert_close(torch.stack(steps, 1), expected, atol=2e-5, rtol=1e-5)


def test_caches_keep_only_what_a_mask_sees():
    _, caches = small_model().prefill(small_batch(1)[0], 2)
    assert [k.shape[2] for _, _, k, _ in caches] == [5, 16, 5, 6]  # W + 1, H W, W + 1, W + 2 at kernel 3


def test_greedy_sampling_equals_the_argmax_of_the_uncached_model():
    model = small_model()
    text, _ = small_batch(2)
    drawn = model.generate(text, 2, Sampling(top_k=1))
    with torch.no_grad():
        logits = model(text.repeat_interleave(2, 0), drawn)[1]
    assert torch.equal(logits.argmax(-1).view_as(drawn), drawn)


def test_a_candidate_does_not_depend_on_how_many_there_are():
    model = small_model()
    text, _ = small_batch(1)
    many, few = (model.generate(text, n, Sampling(seed=3)) for n in (7, 2))
    assert torch.equal(many[:2], few)


@pytest.mark.parametrize("format,off", [("float32", 2e-5), ("bfloat16", 0.1), ("int8", 0.3)])
def test_packed_weights_give_the_same_logits(format, off):
    text, codes = small_batch(2)
    model = small_model()
    with torch.no_grad():
        expected = model(text, codes)[1]
        assert model.pack(format) is model
        logits, caches = model.prefill(text, 1)
        steps = [logits]
        for i in range(SMALL.image_len - 1):
            steps.append(model.decode(codes.flatten(1)[:, i], torch.tensor(i), caches))
    difference = (torch.stack(steps, 1) - expected).abs().max()
    assert difference < off
    assert format == "float32" or difference > 1e-4  # the packed weights were the ones that were read


def neg_data(weight: torch.Tensor) -> None:
    weight.data.neg_()


def rows_moved(weight: torch.Tensor) -> None:
    """Another order of the same numbers, of which sums and norms know nothing."""
    weight.data.copy_(weight.roll(1, 0))


def one_bit(weight: torch.Tensor) -> None:
    weight.data.view(torch.int32)[0, 0] ^= 1 << 22


def in_place(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.mul_(-1)


@pytest.mark.parametrize("change", [neg_data, rows_moved, one_bit, in_place])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("format", ["float32", "int8"])
def test_sampling_reads_the_weights_as_they_are(change, inference, format):
    """However a weight was changed, the next codes and logits are those of a new model with that state."""
    text, codes = small_batch(2)
    with torch.inference_mode(inference):
        model, fresh = small_model().pack(format), DALLE(SMALL).eval().pack(format)
        before = model.generate(text, 8)
        for layer in model.layers:
            change(layer.attn.qkv.weight)
            change(layer.mlp[0].weight)
        change(model.to_image.weight)
        with torch.no_grad():
            whole = model(text, codes)
            after = model.generate(text, 8)
            logits, _ = model.prefill(text, 1)
            fresh.load_state_dict(model.state_dict())
            assert torch.equal(fresh.generate(text, 8), after)
            assert torch.equal(fresh.prefill(text, 1)[0], logits)
            assert all(torch.equal(a, b) for a, b in zip(DALLE.forward(fresh, text, codes), whole, strict=True))
        assert change is one_bit or not torch.equal(before, after)
        assert fresh.layers[0].attn.qkv.packed.format == format


def test_a_format_that_is_none_is_refused():
    with pytest.raises(ValueError, match="format: expected one of float32, bfloat16, int8, got 'int4'"):
        small_model().pack("int4")


def test_training_goes_on_from_packed_weights():
    model, other = small_model(), small_model()
    batch = small_batch(2)
    model.pack().generate(batch[0], 1)
    for m in (model, other):
        m.loss(*batch)[0].backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_guide():
    with_caption, without = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0))
    both = torch.cat([with_caption, without])
    torch.testing.assert_close(guide(both, 1.0), with_caption)
    torch.testing.assert_close(guide(both, 3.0), without + 3 * (with_caption - without))


def test_same_seed_same_codes_and_inputs_stay_untouched():
    model = small_model()
    text, codes = small_batch(2)
    text_before, codes_before = text.clone(), codes.clone()
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[:2] = True
    for options in ({}, {"guidance": 3.0}, {"top_k": 5, "top_p": 0.9}):
        for prompt in (None, (codes[0], keep)):
            a, b, c = (model.generate(text, 3, Sampling(**options, seed=seed), prompt) for seed in (7, 7, 8))
            assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(text, text_before) and torch.equal(codes, codes_before)


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("options", [{}, {"guidance": 3.0}, {"top_k": 5, "top_p": 0.9}], ids=str)
def test_a_step_of_sampling_never_waits_for_the_device(monkeypatch, options, prompted):
    """As a CUDA graph needs it: here its tensors have no values, and to read one is an error."""
    ran = []

    def without_values(repeat, times):
        with FakeTensorMode(allow_non_fake_inputs=True):
            repeat._step()
            ran.append(times)
            with pytest.raises(DataDependentOutputException):
                codes[0, 0, 0].item()

    text, codes = small_batch(2)
    prompt = (codes[0], torch.arange(16).view(4, 4) < 4) if prompted else None
    monkeypatch.setattr(Repeat, "run", without_values)
    small_model().generate(text, 3, Sampling(**options), prompt)
    assert ran == [SMALL.image_len - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"guidance": 3.0, "top_k": 5}], ids=str)
def test_the_codes_are_the_same_step_by_step(monkeypatch, options, dtype, device):
    """On CUDA, those of a recorded step and of a called one."""
    model = small_model().to(device, dtype)
    text = small_batch(2)[0].to(device)
    drawn = model.generate(text, 3, Sampling(**options, seed=5))
    monkeypatch.setattr(sampling, "Repeat", lambda step, graph_on: Repeat(step))
    assert torch.equal(model.generate(text, 3, Sampling(**options, seed=5)), drawn)


def test_codes_are_yielded_as_they_grow():
    model = small_model()
    text, _ = small_batch(1)
    with torch.no_grad():
        logits, caches = model.prefill(text, 1)
        decode = partial(model.decode, caches=caches)
        rows = [row.clone() for row in draw_codes(decode, logits, 16, Sampling(seed=3), 1.0, None, every=4)]
    whole = model.generate(text, 1, Sampling(seed=3)).flatten(1)
    assert [row.shape[1] for row in rows] == [4, 8, 12, 16]
    assert all(torch.equal(row, whole[:, : row.shape[1]]) for row in rows)


@pytest.mark.parametrize("times", [(0,), (1,), (2,), (5,), (0, 1, 2), (2, 0, 3)], ids=str)
def test_a_recorded_step_runs_as_often_as_a_called_one(monkeypatch, times):
    ran, recording = [], []

    @contextmanager
    def graph(_, stream):
        recording.append(stream)
        yield
        recording.pop()

    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: ran.append("synchronized"))
    fakes = {
        "Stream": lambda device: stream,
        "current_stream": lambda device: None,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: ran.append("step")),
        "graph": graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    repeat = Repeat(lambda: None if recording else ran.append("step"), graph_on=torch.device("cuda"))
    for count in times:
        repeat.run(count)
        assert ran == ["step"] * count + ["synchronized"]
        ran.clear()


def test_guidance_of_one_is_no_guidance_and_more_of_it_moves_the_logits():
    model = small_model()
    text, _ = small_batch(1)
    plain = model.generate(text, 4)
    assert torch.equal(plain, model.generate(text, 4, Sampling(guidance=1.0)))
    guided = model.generate(text, 4, Sampling(guidance=4.0, top_k=1))
    own = small_model(replace(SMALL, guidance=4.0))
    assert torch.equal(guided, own.generate(text, 4, Sampling(top_k=1)))  # None is the model's own
    empty = torch.arange(SMALL.text_len) + SMALL.text_vocab
    with torch.no_grad():
        with_caption = model(text.repeat(4, 1), guided)[1]
        without = model(empty.repeat(4, 1), guided)[1]
    assert torch.equal((without + 4.0 * (with_caption - without)).argmax(-1).view_as(guided), guided)


@pytest.mark.parametrize("rows,columns", [(1, 0), (2, 0), (3, 3), (0, 2), (1, 1)])
def test_image_prompt_redraws_exactly_the_rectangle(rows, columns):
    model = small_model()
    text, codes = small_batch(1)
    keep = leading(4, 4, rows, columns)
    drawn = model.generate(text, 8, image_prompt=(codes[0], keep))
    assert (drawn[:, keep] == codes[0][keep]).all()
    assert (drawn[:, ~keep] != codes[0][~keep]).any()


@pytest.mark.parametrize(
    "codes,keep,message",
    [
        (torch.zeros(4, 3, dtype=torch.int64), None, r"expected int64 codes \[4, 4\], got torch.int64 \[4, 3\]"),
        (torch.zeros(4, 4), None, r"expected int64 codes \[4, 4\], got torch.float32 \[4, 4\]"),
        (torch.full((4, 4), 13), None, r"expected codes in \[0, 13\), got 13 to 13"),
        (None, torch.zeros(4, 3, dtype=torch.bool), r"expected a bool map \[4, 4\], got torch.bool \[4, 3\]"),
        (None, torch.zeros(4, 4), "expected a bool map"),
    ],
)
def test_bad_image_prompts(codes, keep, message):
    codes = torch.zeros(4, 4, dtype=torch.int64) if codes is None else codes
    keep = leading(4, 4, 1, 0) if keep is None else keep
    with pytest.raises(ValueError, match=f"image_prompt: {message}"):
        small_model().generate(small_batch(1)[0], 1, image_prompt=(codes, keep))


def test_image_prompt_that_misses_the_corner_is_refused():
    text, codes = small_batch(1)
    keep = torch.ones(4, 4, dtype=torch.bool)
    for rows, columns in ((slice(0, 2), slice(0, 4)), (slice(1, 3), slice(1, 3)), (slice(0, 0), slice(0, 0))):
        holes = keep.clone()
        holes[rows, columns] = False
        with pytest.raises(ValueError, match="bottom-right corner"):
            small_model().generate(text, 1, image_prompt=(codes[0], holes))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"temperature": float("nan")}, "temperature: expected .* got nan"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": 0}, "top_k: expected 1 or more, got 0"),
        ({"top_p": 1.5}, "top_p: expected a share"),
        ({"guidance": float("inf")}, "guidance"),
        ({"seed": 2**63}, "seed: expected an integer of 64 bits, got 9223372036854775808"),
        ({"seed": 0.5}, "seed: expected an integer of 64 bits, got 0.5"),
    ],
)
def test_bad_sampling_options(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_no_candidates():
    with pytest.raises(ValueError, match="n: expected 1 or more, got 0"):
        small_model().generate(small_batch(1)[0], 0)


def test_bad_batches():
    model = small_model()
    text, codes = small_batch(2)
    with pytest.raises(ValueError, match=r"text_tokens: expected \[B, 5\]"):
        model(text[:, :4], codes)
    with pytest.raises(ValueError, match="text_tokens: expected values"):
        model(text + 25, codes)
    with pytest.raises(ValueError, match=r"codes: expected \[B, 4, 4\]"):
        model(text, codes[:, :3])
    with pytest.raises(ValueError, match="codes: expected values"):
        model(text, codes + 13)
    with pytest.raises(ValueError, match="B >= 1"):
        model(text[:0], codes[:0])
    with pytest.raises(TypeError, match="int64"):
        model(text.float(), codes)


def test_loss_weights_text_one_eighth():
    model = small_model()
    text, codes = small_batch(3)
    logits_text, logits_image = model(text, codes)
    log_text = logits_text.log_softmax(-1).gather(-1, text[..., None])
    log_image = logits_image.log_softmax(-1).gather(-1, codes.flatten(1)[..., None])
    loss, parts = model.loss(text, codes)
    torch.testing.assert_close(loss, -(log_text.mean() / 8 + log_image.mean() * 7 / 8))
    torch.testing.assert_close(parts, {"text_loss": -log_text.mean(), "image_loss": -log_image.mean()})


def test_layer_reads_its_own_norms():
    layer = Layer(32, 16, df.AttentionMask("row", 5, 4, 4))
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == {"attn_norm", "attn", "mlp_norm", "mlp"}
