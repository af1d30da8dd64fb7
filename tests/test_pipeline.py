"""A folder of models, from a caption to reranked images."""

import numpy as np
import pytest
import torch
from PIL import Image

from dalle_fast.config import CLIPConfig, DALLEConfig, DVAEConfig, Sampling
from dalle_fast.figures import contact_sheet, save_image
from dalle_fast.models import CLIP, DALLE, DiscreteVAE, load_model, save_model
from dalle_fast.pipeline import TextToImage
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
