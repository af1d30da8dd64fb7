"""Captions to tokens: byte-level BPE of lowercased text (section 2.2)."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import signal
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from . import _host
from .captions import clean_caption
from .files import write_atomically

DROPOUT = 0.1  # BPE dropout in training (section 2.2)
MAX_SIZE = 10_000_000  # of vocabulary and captions: the library allocates it, and ends the process if it cannot
MAX_WORD = 1_000  # characters; longer words are cut, as learning takes time quadratic in the longest
_FORMAT = "dalle_fast.tokenizer"
_PROBE = " ".join(["A red Circle, 12 blue SQUARES: e\u0301 \u00e9 don't!"] * 4)
_KEYS = {"format", "vocab_size", "text_len", "tokenizer"}  # of a file; newer ones also have a checksum
_BYTES = 256  # tokens of one byte, the first of a vocabulary
_LONG_WORD = re.compile(rf"[^ ]{{{MAX_WORD}}}(?=[^ ])")


class Tokenizer:
    """Byte-level BPE with one padding id per text position.

    Ids below ``vocab_size`` are text; an unused position ``i`` of the ``text_len`` holds ``vocab_size + i``.
    Made by :meth:`train` or :meth:`load`. Any string can be encoded; decoding returns it clean (see
    :func:`dalle_fast.captions.clean_caption`), in lower case and NFC.

    Args:
        backend: a byte-level BPE of the ``tokenizers`` library.
        vocab_size: ids reserved for text; a small corpus may leave some of them unused.
        text_len: tokens per caption, padding included.
    """

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int, text_len: int) -> None:
        if text_len < 1:
            raise ValueError(f"text_len: expected 1 or more, got {text_len}")
        if vocab_size < backend.get_vocab_size():
            raise ValueError(f"vocab_size: expected at least the {backend.get_vocab_size()} tokens, got {vocab_size}")
        backend.model.dropout = None  # the library's dropout has no seed: see _encode_with_dropout
        self._backend = backend
        self.vocab_size = vocab_size
        self.text_len = text_len

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 16384, text_len: int = 256) -> Tokenizer:
        """Learn the merges from captions. ``vocab_size`` counts the 256 bytes too.

        Captions are cut at 10,000 characters, and words at 1,000. Ctrl-C ends the work at once.
        """
        if vocab_size < _BYTES:
            raise ValueError(f"vocab_size: expected {_BYTES} or more, one for each byte, got {vocab_size}")
        if vocab_size > MAX_SIZE:
            raise ValueError(f"vocab_size: expected {MAX_SIZE:,} or less, got {vocab_size}")
        if text_len < 1:
            raise ValueError(f"text_len: expected 1 or more, got {text_len}")
        return cls(_learn(captions, vocab_size), vocab_size, text_len)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to one JSON file, atomically."""
        content = {
            "format": _FORMAT,
            "vocab_size": self.vocab_size,
            "text_len": self.text_len,
            "tokenizer": json.loads(self._backend.to_str()),
        }
        content["checksum"] = _checksum(content)
        write_atomically(path, json.dumps(content, ensure_ascii=False))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a file of :meth:`save`.

        Raises:
            ValueError: it is another file, or damaged; the message names it.
            OSError: it cannot be read.
        """
        content = Path(path).read_bytes()
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tokenizer file {path}: expected JSON, got {error}") from None
        if not isinstance(fields, dict) or fields.get("format") != _FORMAT:
            raise ValueError(f"tokenizer file {path}: expected the format {_FORMAT}, got another JSON file")
        try:
            return cls._from_fields(fields)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tokenizer file {path}: {error}") from None

    @classmethod
    def _from_fields(cls, fields: dict[str, Any]) -> Tokenizer:
        if fields.keys() - {"checksum"} != _KEYS:
            raise ValueError(f"expected {', '.join(sorted(_KEYS))}, got {', '.join(sorted(fields))}")
        if "checksum" in fields and fields.pop("checksum") != _checksum(fields):
            raise ValueError("expected it as it was written, got another checksum")
        for name in ("vocab_size", "text_len"):
            if type(fields[name]) is not int or not 1 <= fields[name] <= MAX_SIZE:
                raise ValueError(f"{name}: expected an integer from 1 to {MAX_SIZE:,}, got {fields[name]!r}")
        return cls(_read_backend(fields["tokenizer"]), fields["vocab_size"], fields["text_len"])

    def encode(
        self,
        captions: str | list[str],
        seed: int | Sequence[int] | None = None,
        dropout: float = DROPOUT,
        truncate: bool = False,
    ) -> torch.Tensor:
        """Tokens of the captions, padded: int64 [B, text_len] (B = 1 for a single string).

        Captions are cleaned first, so that white space and HTML entities are as in training.

        Args:
            seed: with a seed, merges are dropped with probability ``dropout``, the same ones for the same seed.
                Caption ``i`` uses ``seed + i``, or ``seed[i]`` of a list. Without a seed no merge is dropped.
            truncate: cut a caption that is too long instead of raising ValueError.
        """
        captions = [captions] if isinstance(captions, str) else captions
        for caption in captions:
            if not isinstance(caption, str):
                raise TypeError(f"captions: expected strings, got {type(caption).__name__}")
            if any("\ud800" <= character <= "\udfff" for character in caption):
                raise ValueError(f"caption: expected valid Unicode, got a lone surrogate in {caption[:60]!r}")
        if not isinstance(seed, int) and seed is not None and len(seed) != len(captions):
            raise ValueError(f"seed: expected one for each of {len(captions)} captions, got {len(seed)}")
        captions = [clean_caption(caption, cut=truncate) for caption in captions]
        tokens = torch.arange(self.vocab_size, self.vocab_size + self.text_len).repeat(len(captions), 1)
        for i, caption in enumerate(captions):
            if seed is None:
                ids = [i for piece in _pieces(caption) for i in self._backend.encode(piece).ids]
            else:
                ids = self._encode_with_dropout(caption, seed + i if isinstance(seed, int) else seed[i], dropout)
            if len(ids) > self.text_len and not truncate:
                raise ValueError(f"caption: expected at most {self.text_len} tokens, got {len(ids)}: {caption[:60]!r}")
            ids = ids[: self.text_len]
            tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        return tokens

    def decode(self, tokens: torch.Tensor) -> str | list[str]:
        """The caption of tokens [text_len], or the list of captions of [B, text_len]; padding is dropped."""
        if tokens.ndim not in (1, 2):
            raise ValueError(f"tokens: expected [text_len] or [B, text_len], got shape {tuple(tokens.shape)}")
        last = self.vocab_size + self.text_len - 1
        if tokens.numel() and (tokens.min() < 0 or tokens.max() > last):
            raise ValueError(f"tokens: expected 0 to {last}, got {int(tokens.min())} to {int(tokens.max())}")
        if tokens.ndim == 2:
            return [self._decode(row) for row in tokens.tolist()]
        return self._decode(tokens.tolist())

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides which tokens a caption becomes; models are trained with one tokenizer."""
        model = json.loads(self._backend.to_str())["model"]
        content = [self.vocab_size, self.text_len, sorted(model["vocab"].items()), model["merges"]]
        content.append(self._backend.encode(_PROBE).ids)  # what is done to a text before the merges
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode([i for i in ids if i < self.vocab_size])

    def _encode_with_dropout(self, caption: str, seed: int, dropout: float) -> list[int]:
        normalize, split = self._backend.normalizer.normalize_str, self._backend.pre_tokenizer.pre_tokenize_str
        words = [word for piece in _pieces(caption) for word, _ in split(normalize(piece))]
        return self._bpe.encode(words, dropout, seed % 2**64)

    @cached_property
    def _bpe(self) -> _host.BPE:
        model = json.loads(self._backend.to_str())["model"]
        return _host.BPE(model["vocab"], [tuple(merge) for merge in model["merges"]])

    def __getstate__(self) -> dict[str, Any]:
        """Without the dropout encoder: data workers that are spawned build their own."""
        return {name: value for name, value in self.__dict__.items() if name != "_bpe"}


def _backend_of(model: models.BPE) -> tokenizers.Tokenizer:
    """A tokenizer of the library with this model; all else is the same in all of ours."""
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _pieces(caption: str) -> list[str]:
    """A clean caption, cut where a word is too long."""
    return _LONG_WORD.sub(r"\g<0>\n", caption).split("\n") if len(caption) > MAX_WORD else [caption]


def _learn(captions: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train in a process of its own: the library does not let Ctrl-C through, but a process can be ended."""
    fork = multiprocessing.get_context("fork")  # the captions need not be copied
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_learn_here, args=(captions, vocab_size, sender), daemon=True)
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(f"tokenizer: expected a result, got exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if isinstance(result, BaseException):
        raise result
    return tokenizers.Tokenizer.from_str(result)


def _learn_here(captions: Iterable[str], vocab_size: int, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    backend = _backend_of(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    try:
        pieces = (piece for caption in captions for piece in _pieces(clean_caption(caption, cut=True)))
        backend.train_from_iterator(pieces, trainer)
        sender.send(backend.to_str())
    except Exception as error:
        sender.send(error)


# ---------------------------------------------------------------------------------------------- files


def _checksum(fields: dict[str, Any]) -> int:
    """CRC-32 of the content of a file, whatever the order and white space of its JSON."""
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def _read_backend(fields: Any) -> tokenizers.Tokenizer:
    """A tokenizer of the library from its JSON. Raises ValueError unless that is as :meth:`Tokenizer.save` writes it.

    The library reads none of it: it panics at some damage, and takes other parts that would give other tokens.
    """
    expected = json.loads(_backend_of(models.BPE()).to_str())
    if not isinstance(fields, dict) or not isinstance(fields.get("model"), dict):
        raise ValueError("tokenizer: expected a model and its surroundings, got something else")
    model = fields["model"]
    for name in ("normalizer", "pre_tokenizer", "decoder", "post_processor", "truncation", "padding", "added_tokens"):
        if fields.get(name) != expected[name]:
            raise ValueError(f"{name}: expected {expected[name]}, got {fields.get(name)}")
    for name, value in expected["model"].items():
        if name not in ("vocab", "merges") and model.get(name, value) != value:
            raise ValueError(f"model: expected {name} {value!r}, got {model[name]!r}")
    vocab, merges = _vocabulary(model.get("vocab")), _merges(model.get("merges"))
    count = _BYTES
    for merge in merges:  # each makes the next token, unless an earlier one made the same
        made = vocab.get("".join(merge), -1)
        if not _BYTES <= made <= count or any(part not in vocab for part in merge):
            raise ValueError(f"merges: expected two tokens that make token {count}, got {merge}")
        count += made == count
    if len(vocab) != count:
        raise ValueError(f"vocab: expected {count} tokens, of bytes and merges, got {len(vocab)}")
    return _backend_of(models.BPE(vocab, merges))


def _vocabulary(vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or not all(type(number) is int for number in vocab.values()):
        raise ValueError("vocab: expected tokens and their ids")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"vocab: expected the ids 0 to {len(vocab) - 1}, each once")
    if {token for token, number in vocab.items() if number < _BYTES} != set(pre_tokenizers.ByteLevel.alphabet()):
        raise ValueError(f"vocab: expected the bytes as its first {_BYTES} tokens")
    return vocab


def _merges(merges: Any) -> list[tuple[str, str]]:
    pairs = merges if isinstance(merges, list) else [merges]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"merges: expected pairs of tokens, got {str(pair)[:60]}")
    return [(first, second) for first, second in pairs]
