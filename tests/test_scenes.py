"""The synthetic scenes, and the judge that reads them back."""

import numpy as np
import pytest
import torch

from dalle_fast.data import open_pairs
from dalle_fast.data.sources.scenes import (
    COLOURS,
    RELATIONS,
    SHAPES,
    Item,
    Scene,
    SceneCorpus,
    all_items,
    all_scenes,
)
from dalle_fast.demo.judge import Found, detect, relation_holds, verdict

SCENES = {scene.caption: scene for held_out in (False, True) for scene in all_scenes(held_out)}


def images(corpus: SceneCorpus) -> torch.Tensor:
    return torch.from_numpy(np.stack([pair.image for pair in corpus])).permute(0, 3, 1, 2) / 255


def test_the_language():
    assert len(SHAPES) >= 3 and len(COLOURS) == 8 and len(RELATIONS) == 4
    assert Scene(Item("orange", "square")).caption == "an orange square"
    scene = Scene(Item("red", "circle"), "left of", Item("blue", "square"))
    assert scene.caption == "a red circle left of a blue square"


def test_every_scene_has_a_caption_of_its_own():
    assert len(SCENES) == 24 + 24 * 23 * 4


def test_some_pairs_of_items_never_meet_in_training():
    seen, held_out = all_scenes(False), all_scenes(True)
    assert len(seen) + len(held_out) == 24 + 24 * 23 * 4
    assert 0.08 < len(held_out) / (len(seen) + len(held_out)) < 0.17
    pairs = [{frozenset((str(s.first), str(s.second))) for s in side if s.second} for side in (seen, held_out)]
    assert not pairs[0] & pairs[1]
    # Every item is in training, so that only the combinations are new.
    assert {str(s.first) for s in seen} == {str(item) for item in all_items()}
    seen_scenes = {SceneCorpus(2_000).scene(i) for i in range(2_000)}
    assert not any(scene.held_out for scene in seen_scenes)
    assert all(SceneCorpus(200, held_out=True).scene(i).held_out for i in range(200))


def test_same_seed_and_index_same_pair():
    a, b, c = SceneCorpus(50, seed=3)[7], SceneCorpus(9, seed=3)[7], SceneCorpus(50, seed=4)[7]
    assert a.caption == b.caption and np.array_equal(a.image, b.image)
    assert not np.array_equal(a.image, c.image)
    assert a.image.shape == (32, 32, 3) and a.image.dtype == np.uint8
    with pytest.raises(IndexError, match="index: expected 0 to 49, got 50"):
        SceneCorpus(50)[50]


def test_images_of_one_caption_differ_in_size_and_place():
    corpus = SceneCorpus(3_000, seed=1)
    alone = [i for i in range(3_000) if corpus.scene(i) == Scene(Item("red", "circle"))]
    found = [f[0] for f in detect(torch.stack([image_of(corpus, i) for i in alone]))]
    assert len(found) > 10
    assert np.std([f.x for f in found]) > 0.05 and np.std([f.y for f in found]) > 0.05


def image_of(corpus: SceneCorpus, index: int) -> torch.Tensor:
    return torch.from_numpy(corpus[index].image).permute(2, 0, 1) / 255


@pytest.mark.parametrize("held_out", [False, True])
def test_the_judge_is_right_on_rendered_scenes(held_out):
    corpus = SceneCorpus(400, seed=11, held_out=held_out)
    right = [all(verdict(corpus.scene(i), found)) for i, found in enumerate(detect(images(corpus)))]
    assert np.mean(right) >= 0.98


def test_the_judge_refuses_what_a_caption_does_not_say():
    corpus = SceneCorpus(200, seed=12)
    found = detect(images(corpus))
    for i in range(200):
        scene = corpus.scene(i)
        if scene.second is None:
            continue
        swapped = Scene(scene.second, scene.relation, scene.first)
        others = [Scene(scene.first, r, scene.second) for r in RELATIONS if r != scene.relation]
        assert not any(all(verdict(wrong, found[i])) for wrong in [swapped, Scene(scene.first), *others]), scene


def test_relations_use_the_longer_axis():
    def at(x: float, y: float) -> Found:
        return Found(Item("red", "circle"), x, y)

    middle = at(0.5, 0.5)
    for other, relation in (
        (at(0.6, 0.9), "above"),
        (at(0.4, 0.1), "below"),
        (at(0.9, 0.6), "left of"),
        (at(0.1, 0.4), "right of"),
    ):
        assert [r for r in RELATIONS if relation_holds(r, middle, other)] == [relation]


def test_an_empty_image_shows_nothing():
    assert detect(torch.full((2, 3, 32, 32), 0.97)) == [[], []]


def test_scenes_open_as_a_corpus():
    pairs = open_pairs("scenes")
    assert len(pairs) > 10_000 and list(pairs.skipped) == []
    assert all(SCENES[pairs[i].caption].held_out is False for i in range(20))
    assert all(SCENES[open_pairs("scenes:held-out")[i].caption].held_out for i in range(20))
