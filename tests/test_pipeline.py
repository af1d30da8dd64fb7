"""A folder of models, from a caption to reranked images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_fast.config import CLIPConfig, DALLEConfig, DVAEConfig, Sampling
from dalle_fast.figures import contact_sheet, save_image
from dalle_fast.models import CLIP, DALLE, DiscreteVAE, hash_of, load_model, save_model
from dalle_fast.pipeline import BUILT_IN, TextToImage
from dalle_fast.tokenizer import Tokenizer

DVAE_CFG = DVAEConfig(image_size=16, vocab_size=16, n_hid=8, n_init=8, groups=(1, 2, 2), n_blk_per_group=1)
DALLE_CFG = DALLEConfig(
    text_vocab=300, text_len=8, image_vocab=16, height=4, width=4, d_model=32, n_layer=3, head_dim=16, kernel=3
)
CLIP_CFG = CLIPConfig(
    image_size=16, patch_size=8, vision_width=32, vision_layers=1,
    text_vocab=300, text_len=8, text_width=32, text_layers=1, head_dim=16, embed_dim=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("system")
    for name, model in (("dvae", DiscreteVAE(DVAE_CFG)), ("dalle", DALLE(DALLE_CFG)), ("clip", CLIP(CLIP_CFG))):
        save_model(model, out / f"{name}.safetensors")
    Tokenizer.train(["a red circle above a blue square"] * 3, vocab_size=300, text_len=8).save(out / "tokenizer.json")
    return out


def copy_of(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_best_come_first_and_the_seed_decides_the_images(folder):
    pipe = TextToImage.load(folder)
    result = pipe("a red circle", n=6, top=3, sampling=Sampling(seed=4))
    assert result.images.shape == (3, 3, 16, 16) and 0 <= result.images.min() <= result.images.max() <= 1
    assert result.scores.tolist() == sorted(result.scores.tolist(), reverse=True)
    everything = pipe("a red circle", n=6, top=6, sampling=Sampling(seed=4))
    assert torch.equal(everything.images[:3], result.images)
    assert not torch.equal(pipe("a red circle", n=6, top=6, sampling=Sampling(seed=5)).images, everything.images)


def test_many_candidates_are_sampled_in_batches(folder):
    pipe = TextToImage.load(folder)
    assert pipe("a red circle", n=70, top=70).images.shape[0] == 70


def test_image_prompt_keeps_leading_rows_and_columns(folder):
    pipe = TextToImage.load(folder)
    image = np.random.default_rng(0).integers(0, 256, (20, 16, 3), dtype=np.uint8)
    codes, keep = pipe._prompt(image, 1, 2)
    assert keep.tolist() == [[True] * 4, *[[True, True, False, False]] * 3]
    drawn = pipe.dalle.generate(pipe.tokenizer.encode(["a red circle"]), 5, image_prompt=(codes, keep))
    assert (drawn[:, keep] == codes[keep]).all()
    assert pipe("a red circle", n=2, top=1, image_prompt=image, keep_rows=2).images.shape == (1, 3, 16, 16)


def test_models_survive_the_file(folder, tmp_path):
    model = load_model(folder / "dalle.safetensors", "dalle")
    assert model.cfg == DALLE_CFG and not model.training
    save_model(model, tmp_path / "half.safetensors", half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.55 * (folder / "dalle.safetensors").stat().st_size
    again = load_model(tmp_path / "half.safetensors")
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.half().float(), b)
    assert load_model(folder / "dvae.safetensors").cfg == DVAE_CFG


@pytest.mark.parametrize(
    "options,message",
    [
        ({"n": 2, "top": 3}, "top: expected 1 to n = 2, got 3"),
        ({"keep_rows": 1}, "keep_rows, keep_columns: expected an image_prompt"),
        ({"image_prompt": np.zeros((16, 16, 3), np.uint8), "keep_rows": 4}, "keep_rows: expected 0 to 3, got 4"),
    ],
)
def test_bad_requests(folder, options, message):
    with pytest.raises(ValueError, match=message):
        TextToImage.load(folder)("a red circle", **options)


def test_folders_that_are_no_system(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="model: expected a folder or a built-in name"):
        TextToImage.load("no-such-model")
    copy = copy_of(folder, tmp_path)
    (copy / "clip.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"clip\.safetensors"):
        TextToImage.load(copy)
    (copy / "clip.safetensors").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="expected a safetensors file"):
        TextToImage.load(copy)
    (copy / "clip.safetensors").write_bytes((folder / "dvae.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"expected kind clip in .* got 'dvae'"):
        TextToImage.load(copy)


def test_parts_that_do_not_fit_are_refused(folder, tmp_path):
    copy = copy_of(folder, tmp_path)
    Tokenizer.train(["a red circle"], vocab_size=290, text_len=8).save(copy / "tokenizer.json")
    with pytest.raises(ValueError, match=r"text_vocab in .*: expected the tokenizer's 290"):
        TextToImage.load(copy)


def test_contact_sheet_and_its_file(tmp_path):
    sheet = contact_sheet(torch.rand(5, 3, 16, 16), ["a long caption that needs more than one line"] * 5, columns=3)
    assert sheet.width == 3 * (128 + 6) + 6 and sheet.height > 2 * (128 + 14)
    save_image(sheet, tmp_path / "new" / "sheet.png")
    assert Image.open(tmp_path / "new" / "sheet.png").size == sheet.size
    with pytest.raises(ValueError, match=r"image: expected a name such as out\.png, got 'sheet\.xyz'"):
        save_image(sheet, tmp_path / "sheet.xyz")


# ---------------------------------------------------------------------------------------------- parts


def trained_folder(folder, tmp_path):
    """The system, with the hashes that training leaves in the headers of dalle and clip."""
    system = copy_of(folder, tmp_path)
    parts = {"tokenizer": Tokenizer.load(system / "tokenizer.json").fingerprint}
    parts["dvae"] = hash_of(load_model(system / "dvae.safetensors"))
    for name in ("dalle", "clip"):
        model = load_model(system / f"{name}.safetensors")
        model.trained_with = parts if name == "dalle" else {"tokenizer": parts["tokenizer"]}
        save_model(model, system / f"{name}.safetensors")
    return system


def other_merges(system):
    Tokenizer.train(["paris london tower bridge"] * 3, vocab_size=300, text_len=8).save(system / "tokenizer.json")


def truncating(system):
    content = json.loads((system / "tokenizer.json").read_text())
    content["tokenizer"]["truncation"] = {
        "direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    (system / "tokenizer.json").write_text(json.dumps(content))


def other_dvae(system):
    torch.manual_seed(1)
    save_model(DiscreteVAE(DVAE_CFG), system / "dvae.safetensors")


@pytest.mark.parametrize("replace", [other_merges, truncating, other_dvae])
def test_parts_that_were_not_trained_together_are_refused(folder, tmp_path, replace):
    system = trained_folder(folder, tmp_path)
    TextToImage.load(system)
    replace(system)
    problem = {
        other_merges: r"tokenizer in .*: expected the one that dalle was trained with",
        truncating: r"tokenizer file .*tokenizer\.json: expected it as it was written",
        other_dvae: r"dvae in .*: expected the one that dalle was trained with",
    }
    with pytest.raises(ValueError, match=problem[replace]):
        TextToImage.load(system)


def test_half_precision_is_the_same_part(folder, tmp_path):
    system = trained_folder(folder, tmp_path)
    for name in ("dvae", "dalle", "clip"):
        save_model(load_model(system / f"{name}.safetensors"), system / f"{name}.safetensors", half=True)
    TextToImage.load(system)
    other_dvae(system)
    with pytest.raises(ValueError, match="dvae in"):
        TextToImage.load(system)


def test_the_parts_of_the_shipped_model_are_known(tmp_path):
    system = copy_of(BUILT_IN / "tiny", tmp_path)
    Tokenizer.train(["paris london tower bridge"], 512, 16).save(system / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer in"):
        TextToImage.load(system)


# ---------------------------------------------------------------------------------------------- modes, devices, damage


def test_a_system_opens_and_draws_in_inference_mode(folder):
    expected = TextToImage.load(folder)("a red circle", n=3)
    with torch.inference_mode():
        pipe = TextToImage.load(folder)
        assert torch.equal(pipe("a red circle", n=3).images, expected.images)
    assert not any(p.is_inference() for model in (pipe.dvae, pipe.dalle, pipe.clip) for p in model.parameters())
    assert torch.equal(pipe("a red circle", n=3).images, expected.images)


def test_another_default_dtype_changes_nothing(folder):
    expected = TextToImage.load(folder)("a red circle", n=3)
    torch.set_default_dtype(torch.float64)
    try:
        pipe = TextToImage.load(folder)
        result = pipe("a red circle", n=3)
        assert torch.get_default_dtype() == torch.float64
        text = pipe.tokenizer.encode(["a red circle"])
        codes = pipe.dalle.generate(text, 2)
        wide = DALLE(DALLE_CFG)
        assert wide.start.dtype == torch.float64 and wide.generate(text, 2).shape == codes.shape
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(result.images, expected.images) and torch.equal(result.scores, expected.scores)
    assert torch.equal(codes, pipe.dalle.generate(text, 2))


@pytest.mark.parametrize("device", ["mps", "meta", "foo", "", "cuda:99", "cpu:1", "xla"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match="device: expected"):
        TextToImage.load("no-such-model", device=device)  # before models are looked for


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a node without GPU")
def test_cuda_without_a_gpu():
    with pytest.raises(ValueError, match="device: expected one that is there, got cuda, but this torch"):
        TextToImage.load("tiny", device="cuda")


@pytest.mark.parametrize("value", [255.0, -1.0, 1.5, float("nan"), float("inf")])
def test_images_out_of_range_are_refused(folder, value):
    pipe = TextToImage.load(folder)
    images = torch.full((1, 3, 16, 16), 0.5)
    images[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\]"):
        pipe.dvae.encode(images)
    with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\]"):
        pipe.clip.score(images, pipe.tokenizer.encode(["a"]))


def test_scores_that_are_no_numbers_are_refused(folder):
    pipe = TextToImage.load(folder)
    pipe.clip.logit_scale.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="scores: expected finite numbers"):
        pipe("a red circle", n=2)


# ---------------------------------------------------------------------------------------------- captions, top


def test_top_is_at_most_eight_unless_given(folder):
    pipe = TextToImage.load(folder)
    assert [len(pipe("a red circle", n=n).scores) for n in (1, 4, 9)] == [1, 4, 8]
    with pytest.raises(ValueError, match="n: expected 1 or more, got 0"):
        pipe("a red circle", n=0)
    with pytest.raises(TypeError, match="caption: expected one string, got list"):
        pipe(["a", "b"])


def test_a_long_caption_is_refused_or_cut(folder):
    pipe = TextToImage.load(folder)
    with pytest.raises(ValueError, match="caption: expected at most 8 tokens"):
        pipe("q" * 30, n=2)
    assert torch.equal(pipe("q" * 30, n=2, truncate=True).images, pipe("q" * 8, n=2).images)


def test_codes_of_a_caption_do_not_depend_on_the_others(folder):
    model, tokenizer = load_model(folder / "dalle.safetensors"), Tokenizer.load(folder / "tokenizer.json")
    texts = tokenizer.encode(["red", "a blue square", "circle"])
    for sampling in (Sampling(seed=3), Sampling(seed=3, guidance=2.0, top_k=5)):
        together = model.generate(texts, 4, sampling).view(3, 4, 4, 4)
        for text, codes in zip(texts, together, strict=True):
            assert torch.equal(model.generate(text[None], 4, sampling), codes)
