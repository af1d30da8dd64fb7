"""Filters of image-caption pairs by caption and by shape of the image (appendix C of the paper)."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..files import check_new
from .filters import LANGUAGES, Filters
from .pairs import SEPARATOR, BrokenSample, Pairs, captions_at
from .sources.view import Dropped, write_view

REASONS = (
    "kept", "boilerplate", "caption too short", "another language", "aspect ratio", "broken image", "repeated caption"
)  # fmt: skip
KEPT, BOILERPLATE, SHORT, LANGUAGE, ASPECT, BROKEN, REPEATED = range(len(REASONS))

Judge = Callable[[range], tuple[np.ndarray, np.ndarray]]
CHUNK_SIZE = 4_096  # pairs

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\.?"
_NUMERIC = r"\d{1,4}\s?[-/.:]\s?\d{1,2}\s?[-/.:]\s?\d{1,4}"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?"
_YEAR = r"(?:1[89]|20)\d\d"
_DATE = (
    rf"(?:{_NUMERIC}|(?:{_DAY}\s+(?:of\s+)?)?{_MONTH}\s+(?:{_DAY},?\s+)?{_YEAR}|{_MONTH}\s+{_DAY}|{_DAY}\s+{_MONTH}|{_YEAR})"
    r"(?:,?\s+(?:at\s+)?\d{1,2}:\d\d(?::\d\d)?(?:\s?[ap]\.?m\.?)?)?"
)
_MADE = r"(?:photograph(?:ed)?|photo|picture|image|taken|shot|captured|created|uploaded|posted|scanned|published)"
_APP = r"(?:instagram|flickr|picasa|hipstamatic|vsco|snapseed|photoshop|lightroom|gimp|camera\+?|iphone|android)"
_CAMERA = r"(?:imag?e?|pict?|picture|photo|p|scan|screenshot|dsc[fn]?|dcim|img|cimg|hpim|sam|mvi|vid|gopr|dji|pxl|wp)"
_EXTENSION = r"\.(?:jpe?g|png|gif|tiff?|webp|bmp|heic|cr2|nef|arw|dng|raw|psd|mov|mp4|avi)"
_BOILERPLATE = re.compile(
    rf"\b{_MADE}(?:\s+{_MADE})?\s+(?:on|in|at)?\s*(?:the\s+)?{_DATE}"
    rf"|\b{_MADE}(?:\s+{_MADE})?\s+(?:by|with|using|via|from|to|for|on)\s+(?:(?:my|an?|the)\s+)?{_APP}\b"
    rf"|(?<!\S)\S+{_EXTENSION}\b"
    rf"|\b{_CAMERA}[\s_-]*\d[\d\s_-]*"
    r"|\b(?:olympus|kodak|konica minolta|ricoh|minolta|pentax|samsung|casio|sony)\s+"
    r"(?:dsc|digital (?:still )?camera)\b"
    r"|\bdigital camera picture\b|\bexif[\s_]jpeg(?:[\s_]\w+)?"
    r"|\b(?:file|image|no)\s+(?:description|caption|title)(?:\s+(?:un|not\s)?available)?"
    r"|\ball rights reserved\b|\bclick (?:here )?to (?:enlarge|view|see)\b|\buntitled\b"
    rf"|(?:©|\(c\)|\bcopyright\b)\s*(?:{_YEAR})?"
    rf"|\b{_DATE}(?=\W|$)",
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]{2,}|\b[aiAI]\b")


def filter_pairs(
    folder: str | Path,
    source: str | Path,
    pairs: Pairs,
    filters: Filters,
    workers: int = 0,
    chunk_size: int = CHUNK_SIZE,
) -> dict[str, int]:
    """Write a view of the pairs that pass all filters; no pixel is decoded.

    Memory: 18 bytes per pair. Captions count as repeated when they are equal but for case and white space. All captions
    of an image must pass, as training sees all.

    Args:
        folder: a new one, for the view and its report.
        source: the name that ``open_pairs`` opened as ``pairs``.
        workers: processes that read and judge; 0 does it in this one.
        chunk_size: pairs that a process judges at once.

    Returns:
        the number of pairs dropped for each reason, the first that applies: ``boilerplate`` (fewer words than
        ``min_words`` are left without it), ``caption too short``, ``another language``, ``aspect ratio``,
        ``broken image``, ``repeated caption``.

    Raises:
        ValueError: the folder is not new, or no pair is left.
        ImportError: the package that detects languages is missing.
    """
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
    check_new(folder)
    if filters.language != "none":
        _language_detector()  # fails before any work
    reasons, hashes = np.empty(len(pairs), np.uint8), np.empty(len(pairs), np.uint64)
    chunks = [range(start, min(start + chunk_size, len(pairs))) for start in range(0, len(pairs), chunk_size)]
    judged = _map(partial(judge, pairs, filters), chunks, workers)
    for chunk, (some_reasons, some_hashes) in zip(chunks, judged, strict=True):
        reasons[chunk.start : chunk.stop], hashes[chunk.start : chunk.stop] = some_reasons, some_hashes
    often = _more_than(filters.max_repeats, hashes)
    for chunk in chunks:
        rows = slice(chunk.start, chunk.stop)
        reasons[rows][(reasons[rows] == KEPT) & np.isin(hashes[rows], often)] = REPEATED

    def dropped() -> Iterator[Dropped]:
        for index in np.flatnonzero(reasons).tolist():
            broken = reasons[index] == BROKEN  # its caption may be broken, too
            details = {"error": _error_of(pairs, index)} if broken else {"caption": pairs.caption(index)}
            yield Dropped(index, REASONS[reasons[index]], details)

    return write_view(folder, source, pairs, dropped(), {"filter": asdict(filters)})


def _error_of(pairs: Pairs, index: int) -> str:
    """The reason why a pair is broken; "" if it no longer is."""
    try:
        pairs.caption(index)
        pairs.image_size(index)
    except BrokenSample as error:
        return error.reason
    return ""


def _more_than(repeats: int, hashes: np.ndarray) -> np.ndarray:
    """The values that occur more than ``repeats`` times."""
    ordered = np.sort(hashes)
    later = ordered[repeats:]
    return np.unique(later[later == ordered[: len(later)]])


def words_in(caption: str) -> int:
    """The number of words in a caption, without numbers and single letters other than "a" and "I"."""
    return len(_WORD.findall(caption))


def is_boilerplate(caption: str, min_words: int) -> bool:
    """True if a caption has file names, dates, names of cameras or the like, and fewer words are left without them."""
    rest, found = _BOILERPLATE.subn(" ", " ".join(caption.split()))
    return found > 0 and words_in(rest) < min_words


def judge(pairs: Pairs, filters: Filters, chunk: range) -> tuple[np.ndarray, np.ndarray]:
    """The reason to drop each pair of a chunk, uint8 [n], KEPT for none, and a hash of its caption, uint64 [n]."""
    language_of = _language_detector() if filters.language != "none" else None
    reasons, hashes = np.empty(len(chunk), np.uint8), np.empty(len(chunk), np.uint64)
    for row, index in enumerate(chunk):
        try:
            captions = captions_at(pairs, index)
            plain = SEPARATOR.join(" ".join(caption.casefold().split()) for caption in captions)
            hashes[row] = int.from_bytes(hashlib.blake2b(plain.encode(), digest_size=8).digest(), "little")
            image_size = functools.cache(partial(pairs.image_size, index))
            judged = (_reason(caption, image_size, filters, language_of) for caption in captions)
            reasons[row] = next((reason for reason in judged if reason != KEPT), KEPT)
        except BrokenSample:
            hashes[row], reasons[row] = 0, BROKEN
    return reasons, hashes


def _reason(
    caption: str,
    image_size: Callable[[], tuple[int, int]],
    filters: Filters,
    language_of: Callable[[str], str] | None,
) -> int:
    """The first reason to drop a pair, the cheap ones first; KEPT for none."""
    if is_boilerplate(caption, filters.min_words):
        return BOILERPLATE
    if words_in(caption) < filters.min_words:
        return SHORT
    if language_of and language_of(caption) != filters.language:
        return LANGUAGE
    width, height = image_size()
    return ASPECT if max(width, height) > filters.max_aspect * min(width, height) else KEPT


def _language_detector() -> Callable[[str], str]:
    """A function from a text to its language, one of LANGUAGES."""
    try:
        import py3langid
    except ImportError:
        raise ImportError(
            "py3langid: expected the package that detects languages, got none; try: pip install py3langid, "
            "or --language none"
        ) from None
    py3langid.set_languages(LANGUAGES)
    return lambda text: py3langid.classify(text)[0]


def _map(judge: Judge, chunks: list[range], workers: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """``map`` over processes, in order."""
    if workers == 0:
        yield from tqdm(map(judge, chunks), total=len(chunks), unit="chunk", disable=None)  # None: on a tty only
        return
    fork = multiprocessing.get_context("fork")  # an index of millions of pairs is shared, not copied
    with ProcessPoolExecutor(workers, fork, _set_judge, (judge,)) as pool:
        yield from tqdm(pool.map(_judge_here, chunks), total=len(chunks), unit="chunk", disable=None)


_judge: Judge  # of a process of the pool


def _set_judge(judge: Judge) -> None:
    global _judge
    _judge = judge


def _judge_here(chunk: range) -> tuple[np.ndarray, np.ndarray]:
    return _judge(chunk)
