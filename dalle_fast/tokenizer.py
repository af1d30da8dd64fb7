"""Captions to tokens: byte-level BPE of lowercased text (section 2.2)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from . import _host
from .files import write_atomically

DROPOUT = 0.1  # BPE dropout in training (section 2.2)
_FORMAT = "dalle_fast.tokenizer"
_PROBE = " ".join(["A red Circle, 12 blue SQUARES: e\u0301 \u00e9 don't!"] * 4)


class Tokenizer:
    """Byte-level BPE with one padding id per text position.

    Ids below ``vocab_size`` are text; an unused position ``i`` of the ``text_len`` holds ``vocab_size + i``.
    Made by :meth:`train` or :meth:`load`. Any string can be encoded; decoding returns it in lower case and NFC.

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
        """Learn the merges from captions. ``vocab_size`` counts the 256 bytes too."""
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet):
            raise ValueError(f"vocab_size: expected {len(alphabet)} or more, one for each byte, got {vocab_size}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[], show_progress=False
        )
        backend.train_from_iterator(captions, trainer)
        return cls(backend, vocab_size, text_len)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer to one JSON file, atomically."""
        content = {
            "format": _FORMAT,
            "vocab_size": self.vocab_size,
            "text_len": self.text_len,
            "tokenizer": json.loads(self._backend.to_str()),
        }
        write_atomically(path, json.dumps(content, ensure_ascii=False))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a file of :meth:`save`. ValueError if it is another file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"tokenizer file {path}: expected JSON, got {error}") from None
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"tokenizer file {path}: expected the format {_FORMAT}, got another JSON file")
        backend = tokenizers.Tokenizer.from_str(json.dumps(content["tokenizer"]))
        return cls(backend, content["vocab_size"], content["text_len"])

    def encode(
        self,
        captions: str | list[str],
        seed: int | Sequence[int] | None = None,
        dropout: float = DROPOUT,
        truncate: bool = False,
    ) -> torch.Tensor:
        """Tokens of the captions, padded: int64 [B, text_len] (B = 1 for a single string).

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
        tokens = torch.arange(self.vocab_size, self.vocab_size + self.text_len).repeat(len(captions), 1)
        for i, caption in enumerate(captions):
            if seed is None:
                ids = self._backend.encode(caption).ids
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
        text = self._backend.normalizer.normalize_str(caption)
        words = [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        return self._bpe.encode(words, dropout, seed % 2**64)

    @cached_property
    def _bpe(self) -> _host.BPE:
        model = json.loads(self._backend.to_str())["model"]
        return _host.BPE(model["vocab"], [tuple(merge) for merge in model["merges"]])

    def __getstate__(self) -> dict[str, Any]:
        """Without the dropout encoder: data workers that are spawned build their own."""
        return {name: value for name, value in self.__dict__.items() if name != "_bpe"}
