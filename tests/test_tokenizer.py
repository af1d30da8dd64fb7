"""The tokenizer: lossless on any text, a padding id per position, dropout that follows its seed."""

import itertools
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from dalle_fast import _host
from dalle_fast.tokenizer import Tokenizer

CAPTIONS = [
    f"{article} {colour} {shape} {relation} {article} {other}"
    for article, colour, shape, relation, other in itertools.product(
        ("a", "the"), ("red", "green", "blue"), ("circle", "square"), ("above", "below"), ("triangle", "straße", "日本")
    )
]
VOCAB, LENGTH = 400, 64
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=LENGTH // 8)  # at most 4 bytes a character, NFC 8


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, vocab_size=VOCAB, text_len=LENGTH)


def normalized(text: str) -> str:
    return normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]).normalize_str(text)


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT, seed=st.none() | st.integers(-(2**70), 2**70))
def test_any_text_survives(tokenizer: Tokenizer, text: str, seed: int | None) -> None:
    assert tokenizer.decode(tokenizer.encode(text, seed=seed)[0]) == normalized(text)


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT | st.lists(st.sampled_from(CAPTIONS), max_size=3).map("".join))
def test_own_encoder_is_the_librarys_where_nothing_is_dropped(tokenizer: Tokenizer, text: str) -> None:
    plain = tokenizer.encode(text, truncate=True)
    assert torch.equal(tokenizer.encode(text, seed=1, dropout=0.0, truncate=True), plain)


def test_upper_case_and_composition_do_not_matter(tokenizer: Tokenizer) -> None:
    assert torch.equal(tokenizer.encode("A RED E\u0301"), tokenizer.encode("a red é"))


def test_each_unused_position_has_its_own_padding_id(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(["a red circle", ""])
    used = int((tokens[0] < VOCAB).sum())
    assert tokens.dtype == torch.int64
    assert tokens.shape == (2, LENGTH)
    assert 0 < used < LENGTH
    assert tokens[0, used:].tolist() == [VOCAB + i for i in range(used, LENGTH)]
    assert tokens[1].tolist() == [VOCAB + i for i in range(LENGTH)]
    assert tokenizer.decode(tokens) == ["a red circle", ""]


def test_small_corpus_reserves_its_vocabulary() -> None:
    tokenizer = Tokenizer.train(["ab ab"], vocab_size=1000, text_len=4)
    assert tokenizer.vocab_size == 1000
    assert tokenizer.encode("").tolist() == [[1000, 1001, 1002, 1003]]


def test_too_long_caption(tokenizer: Tokenizer) -> None:
    text = "q" * (LENGTH + 1)
    with pytest.raises(ValueError, match=f"caption: expected at most {LENGTH} tokens, got {LENGTH + 1}"):
        tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text, truncate=True)) == ["q" * LENGTH]


def test_dropout_follows_the_seed(tokenizer: Tokenizer) -> None:
    batch = tokenizer.encode(CAPTIONS, seed=7)
    assert torch.equal(batch, tokenizer.encode(CAPTIONS, seed=7))
    assert torch.equal(batch, tokenizer.encode(CAPTIONS, seed=list(range(7, 7 + len(CAPTIONS)))))
    assert torch.equal(batch[3:4], tokenizer.encode(CAPTIONS[3], seed=10))
    assert not torch.equal(batch, tokenizer.encode(CAPTIONS, seed=8))
    assert tokenizer.decode(batch) == CAPTIONS


def test_a_tenth_of_the_merges_is_dropped() -> None:
    """With one merge in all, a word of one pair is left in two pieces with probability 0.1."""
    encoder = _host.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    words = 20_000
    tokens = encoder.encode(["ab"] * words, 0.1, 3)
    dropped = (len(tokens) - words) / words
    assert dropped == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / words) ** 0.5)
    assert encoder.encode(["abab"], 1.0, 0) == [0, 1, 0, 1]


def test_a_passed_over_merge_is_tried_again_after_another() -> None:
    """Merges ab, cd at p = 1/2: cd alone needs ab passed over, cd merged, and ab passed over again, 1/2 each."""
    encoder = _host.BPE({"a": 0, "b": 1, "c": 2, "d": 3, "ab": 4, "cd": 5}, [("a", "b"), ("c", "d")])
    n = 20_000
    results = [tuple(encoder.encode(["abcd"], 0.5, seed)) for seed in range(n)]
    for tokens, share in (((4, 5), 3 / 8), ((4, 2, 3), 1 / 4), ((0, 1, 5), 1 / 8), ((0, 1, 2, 3), 1 / 4)):
        assert results.count(tokens) / n == pytest.approx(share, abs=4 * (share * (1 - share) / n) ** 0.5)


def test_long_words_are_not_quadratic() -> None:
    encoder = _host.BPE({"a": 0, "aa": 1, "aaaa": 2}, [("a", "a"), ("aa", "aa")])
    assert encoder.encode(["a" * 400_003], 0.0, 0) == [2] * 100_000 + [1, 0]


def test_encoder_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="merges"):
        _host.BPE({"a": 0}, [("a", "b")])
    encoder = _host.BPE({"a": 0}, [])
    with pytest.raises(ValueError, match="words"):
        encoder.encode(["b"], 0.1, 0)
    with pytest.raises(ValueError, match="dropout"):
        encoder.encode(["a"], float("nan"), 0)


def test_saved_and_pickled_tokenizers_are_the_same(tokenizer: Tokenizer, tmp_path) -> None:
    tokenizer.encode("a", seed=0)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    assert json.loads((tmp_path / "tokenizer.json").read_text())["tokenizer"]["model"]["dropout"] is None
    for other in (Tokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert (other.vocab_size, other.text_len) == (VOCAB, LENGTH)
        assert torch.equal(other.encode(CAPTIONS), tokenizer.encode(CAPTIONS))
        assert torch.equal(other.encode(CAPTIONS, seed=1), tokenizer.encode(CAPTIONS, seed=1))


def test_training_is_repeatable() -> None:
    first, second = (Tokenizer.train(CAPTIONS, VOCAB, LENGTH).encode(CAPTIONS) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}'])
def test_load_refuses_other_files(tmp_path, content: str) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer file .*other.json"):
        Tokenizer.load(tmp_path / "other.json")


def test_bad_arguments(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="vocab_size: expected 256 or more"):
        Tokenizer.train(CAPTIONS, vocab_size=255)
    with pytest.raises(ValueError, match="text_len"):
        Tokenizer.train(CAPTIONS, VOCAB, text_len=0)
    with pytest.raises(TypeError, match="captions: expected strings, got int"):
        tokenizer.encode(["a", 1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("\ud800")
    with pytest.raises(ValueError, match="seed: expected one for each of 2 captions, got 1"):
        tokenizer.encode(["a", "b"], seed=[1])
    with pytest.raises(ValueError, match="tokens: expected 0 to"):
        tokenizer.decode(torch.tensor([VOCAB + LENGTH]))
    with pytest.raises(ValueError, match="tokens: expected"):
        tokenizer.decode(torch.zeros(1, 1, 1, dtype=torch.int64))
