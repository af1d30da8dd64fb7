"""A run resumes on the corpus, the tokenizer and the dVAE that it began with."""

from dataclasses import replace

import pytest
from helpers.training import CLIP, pairs, settings, task, tokenizer

from dalle_fast.training import fit
from dalle_fast.training.clip import CLIPTask


def test_a_checkpoint_of_another_corpus_is_refused(tmp_path):
    config = settings("clip", steps=2)
    fit(task("clip", config), config, tmp_path)
    for change in (lambda: pairs(11), lambda: named_pairs(10, "b")):
        other = CLIPTask(change(), None, tokenizer(), CLIP, config)
        with pytest.raises(ValueError, match=r"step-00000002: expected corpus=1\d pairs.*, got corpus=10 pairs;"):
            fit(other, config, tmp_path)


def test_corpora_of_equal_numbers_are_told_apart_by_names_and_captions(tmp_path):
    config = settings("clip", steps=2)
    fit(CLIPTask(named_pairs(10, "a"), None, tokenizer(), CLIP, config), config, tmp_path)
    fit(CLIPTask(named_pairs(10, "a"), None, tokenizer(), CLIP, config), replace(config, steps=3), tmp_path)
    with pytest.raises(ValueError, match=r"expected corpus=10 pairs of hash \w+, got corpus=10 pairs of hash"):
        fit(CLIPTask(named_pairs(10, "b"), None, tokenizer(), CLIP, config), replace(config, steps=4), tmp_path)


class NamedPairs(list):
    """Pairs with names, as ``open_pairs`` opens them."""

    folder = ""

    def name(self, index: int) -> str:
        return f"{self.folder}/{index}.png"

    def caption(self, index: int) -> str:
        return self[index].caption


def named_pairs(n: int, folder: str) -> NamedPairs:
    named = NamedPairs(pairs(n))
    named.folder = folder
    return named


@pytest.mark.parametrize("part", ["tokenizer", "dvae"])
def test_a_checkpoint_with_other_parts_is_refused(part, tmp_path):
    config = settings("dalle", steps=2, save_every=2)
    first = task("dalle", config)
    first.model.trained_with[part] = "1"
    fit(first, config, tmp_path)
    other = task("dalle", replace(config, steps=4))
    other.model.trained_with[part] = "2"
    with pytest.raises(ValueError, match=f"expected trained with {part}=2, got trained with {part}=1"):
        fit(other, replace(config, steps=4), tmp_path)
    unknown = task("dalle", replace(config, steps=4))
    unknown.model.trained_with.pop(part, None)
    fit(unknown, replace(config, steps=4), tmp_path)
