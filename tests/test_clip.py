"""The reranker: names, the contrastive loss, the score."""

import math

import pytest
import torch

from dalle_fast.config import PRESETS, CLIPConfig
from dalle_fast.models import CLIP

SMALL = CLIPConfig(
    image_size=16, patch_size=8, vision_width=32, vision_layers=2,
    text_vocab=20, text_len=6, text_width=32, text_layers=2, head_dim=16, embed_dim=24,
)  # fmt: skip


def small_model() -> CLIP:
    torch.manual_seed(0)
    return CLIP(SMALL).eval()


def batch(b: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(20, (b, 6), generator=generator)
    text[:, 4:] = 20 + torch.arange(4, 6)  # padding
    return torch.rand(b, 3, 16, 16, generator=generator), text


def test_parameter_names_and_shapes_are_those_of_openai_clip():
    with torch.device("meta"):
        names = {name: tuple(p.shape) for name, p in CLIP(CLIPConfig()).named_parameters()}
    expected = {
        "visual.conv1.weight": (768, 3, 32, 32),
        "visual.class_embedding": (768,),
        "visual.positional_embedding": (50, 768),
        "visual.ln_pre.weight": (768,),
        "visual.transformer.resblocks.11.attn.in_proj_weight": (2304, 768),
        "visual.transformer.resblocks.11.attn.out_proj.bias": (768,),
        "visual.transformer.resblocks.0.ln_1.weight": (768,),
        "visual.transformer.resblocks.0.mlp.c_fc.weight": (3072, 768),
        "visual.ln_post.bias": (768,),
        "visual.proj": (768, 512),
        "transformer.resblocks.11.mlp.c_proj.weight": (512, 2048),
        "token_embedding.weight": (16384 + 256, 512),
        "positional_embedding": (256, 512),
        "ln_final.weight": (512,),
        "text_projection": (512, 512),
        "logit_scale": (),
    }
    assert expected.items() <= names.items()


def test_features_are_unit_vectors_and_scores_their_scaled_cosine():
    model, (images, text) = small_model(), batch()
    with torch.no_grad():
        a, b = model.encode_image(images), model.encode_text(text)
    torch.testing.assert_close(a.norm(dim=1), torch.ones(4))
    expected = (a * b).sum(1) / 0.07
    torch.testing.assert_close(model.score(images, text), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.score(images, text[:1]), (a * b[:1]).sum(1) / 0.07, rtol=1e-4, atol=1e-4)


def test_text_feature_ignores_what_follows_its_end():
    model, (_, text) = small_model(), batch()
    longer = text.clone()
    longer[:, 5] = 3  # behind the first padding token, where the caption is read
    longer[:, 4] = text[:, 4]
    full = torch.cat([text[:, :4], longer[:, 4:]], 1)
    with torch.no_grad():
        features = model.encode_text(text)
        end = (full < 20).sum(1) > 4
        assert end.all()  # one more real token: the end moves, and so does the feature
        assert not torch.allclose(model.encode_text(full), features)
        other = text.clone()
        other[:, 5] = 20 + 4  # any other padding there
        torch.testing.assert_close(model.encode_text(other), features)


def test_loss_equals_cross_entropy_when_captions_differ():
    model, (images, text) = small_model(), batch()
    logits = model.logits(images, text)
    target = torch.arange(4)
    expected = (
        torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
    ) / 2
    torch.testing.assert_close(model.loss(images, text)[0], expected)


def test_equal_captions_are_no_mistake():
    model, (images, text) = small_model(), batch(2)
    text = text[:1].repeat(2, 1)
    loss, metrics = model.loss(images, text)
    assert metrics["accuracy"] == 1.0
    assert loss.item() >= math.log(2) - 1e-5  # the two images of one caption cannot be told apart


def test_a_few_steps_match_images_to_captions():
    model, (images, text) = small_model().train(), batch(4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(40):
        loss, metrics = model.loss(images, text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["accuracy"] == 1.0 and loss < 0.5


def test_bad_input():
    model, (images, text) = small_model(), batch()
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, 16, 16\]"):
        model.score(images[..., :8], text)
    with pytest.raises(ValueError, match=r"text_tokens: expected \[B, 6\]"):
        model.score(images, text[:, :3])
    with pytest.raises(ValueError, match="text_tokens: expected 1 or 4 captions, got 3"):
        model.score(images, text[:3])
    with pytest.raises(ValueError, match="image_size: expected a multiple of 7"):
        CLIPConfig(image_size=32, patch_size=7)
    assert PRESETS["tiny"].clip.image_size == PRESETS["tiny"].dvae.image_size
