"""The tokenizer: lossless on any text, a padding id per position, dropout that follows its seed."""

import itertools
import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.tars import png
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from dalle_fast import _host
from dalle_fast.captions import clean_caption
from dalle_fast.data import open_pairs
from dalle_fast.tokenizer import Tokenizer, _checksum

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
    assert tokenizer.decode(tokenizer.encode(text, seed=seed)[0]) == normalized(clean_caption(text))


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


# ---------------------------------------------------------------------------------------------- captions of strangers


def test_white_space_and_entities_do_not_change_a_caption(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """When it is drawn, and between training and drawing."""
    plain = tokenizer.encode("a red circle & a square")
    for other in ("a  red\tcircle &amp; a square\n", "\ufeff a red\u00a0circle &#38; a\u200b square"):
        assert torch.equal(tokenizer.encode(other), plain)
        assert torch.equal(tokenizer.encode(other, seed=3), tokenizer.encode("a red circle & a square", seed=3))
        (tmp_path / "a.txt").write_text(other, encoding="utf-8")
        (tmp_path / "a.png").write_bytes(png())
        assert torch.equal(tokenizer.encode(open_pairs(tmp_path)[0].caption), plain)


@pytest.mark.parametrize("word", ["x", "é", "xy\u0301", "日", "&amp"])
def test_one_long_caption_takes_no_long_time(word: str) -> None:
    start = time.perf_counter()
    tokenizer = Tokenizer.train([*CAPTIONS, word * (1_000_000 // len(word))], VOCAB, LENGTH)
    for seed in (None, 0):
        assert tokenizer.encode(word * 1_000_000, seed=seed, truncate=True)[0, 0] < VOCAB
    assert time.perf_counter() - start < 20
    with pytest.raises(ValueError, match="caption: expected at most 10,000 characters, got"):
        tokenizer.encode(word * 1_000_000)


def test_long_words_are_cut_alike_with_dropout_and_without() -> None:
    tokenizer = Tokenizer.train(CAPTIONS, VOCAB, 8_000)
    text = "abc" * 1_200 + " red " + "ü" * 999 + " " + "x" * 1_001
    plain = tokenizer.encode(text)
    assert torch.equal(tokenizer.encode(text, seed=1, dropout=0.0), plain)
    assert tokenizer.decode(plain) == [text]


def test_ctrl_c_ends_the_training(tmp_path: Path) -> None:
    """While it reads captions and while it learns merges, of which there are more than can be learned in a minute."""
    script = (
        "import itertools, random, sys; from dalle_fast.tokenizer import Tokenizer; print('ready', flush=True)\n"
        "words = (''.join(random.choices('abcdefgh', k=900)) for _ in itertools.count())\n"
        "Tokenizer.train(itertools.islice(words, int(sys.argv[1])), 1_000_000)"
    )
    for count in (10**9, 6_000):
        process = subprocess.Popen([sys.executable, "-c", script, str(count)], stdout=-1, stderr=-1)
        assert process.stdout and process.stdout.readline() == b"ready\n"
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=15)
        assert b"KeyboardInterrupt" in errors
        assert process.returncode == -signal.SIGINT


# ---------------------------------------------------------------------------------------------- damaged files


def damaged(content: dict) -> list[dict]:
    """Versions of the content of a file, none of which can be used; their checksums are right."""
    model = content["tokenizer"]["model"]
    reversed_ids = {token: len(model["vocab"]) - 1 - number for token, number in model["vocab"].items()}
    top: list[dict] = [{key: value for key, value in content.items() if key != gone} for gone in content]
    top += [
        {**content, key: value}
        for key in ("vocab_size", "text_len")
        for value in (None, "16", -1, 0, 1.5, True, [], 2**70)
    ]
    top += [{**content, "tokenizer": value} for value in ({}, None, [], "x")]
    inner: list[dict] = [{"pre_tokenizer": None}, {"normalizer": None}, {"decoder": None}, {"model": {}}]
    inner += [{"truncation": {"max_length": 1}}, {"added_tokens": [{"id": 0, "content": "x"}]}, {"padding": {}}]
    parts: list[dict] = [{"type": "WordPiece"}, {"unk_token": "x"}, {"vocab": []}, {"vocab": reversed_ids}]
    parts += [
        {"merges": merges} for merges in (None, 3, [["x"]], ["a b c"], [["a", "never"]], model["merges"][1:], [[1, 2]])
    ]
    parts += [{"vocab": {**model["vocab"], "a": value}} for value in (-1, 10**9, "1", None, 2**70)]
    inner += [{"model": {**model, **part}} for part in parts]
    return top + [{**content, "tokenizer": {**content["tokenizer"], **change}} for change in inner]


@pytest.mark.parametrize("with_checksum", [False, True])
def test_damaged_files_are_named(tokenizer: Tokenizer, tmp_path: Path, with_checksum: bool) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    content = json.loads(path.read_text())
    del content["checksum"]
    path.write_text(json.dumps(content))
    assert torch.equal(Tokenizer.load(path).encode(CAPTIONS), tokenizer.encode(CAPTIONS))  # an older file
    cases = damaged(content)
    assert len(cases) > 40
    for fields in cases:
        path.write_text(json.dumps({**fields, "checksum": _checksum(fields)} if with_checksum else fields))
        with pytest.raises(ValueError, match=r"tokenizer file .*tokenizer\.json: "):
            Tokenizer.load(path)
    for text in (b"", b"\xff\xfe", b"[" * 200_000, b'{"a":' * 200_000, b"1" * 5_000):
        path.write_bytes(text)
        with pytest.raises(ValueError, match=r"tokenizer file .*tokenizer\.json: "):
            Tokenizer.load(path)


def test_a_changed_number_is_noticed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace(f'"text_len": {LENGTH}', f'"text_len": {LENGTH + 1}'))
    with pytest.raises(ValueError, match="expected it as it was written, got another checksum"):
        Tokenizer.load(tmp_path / "tokenizer.json")
