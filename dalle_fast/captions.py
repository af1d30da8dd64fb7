"""The one form of a caption, in which it is trained on and drawn from."""

from __future__ import annotations

import html
import re
from html.entities import html5

MAX_LENGTH = 10_000  # characters of a caption; longer text is a log or a data URI, and takes seconds to encode
_ENTITY = re.compile(r"&(?:#(\d{1,7}|[xX][0-9a-fA-F]{1,6})|([a-zA-Z][a-zA-Z0-9]{1,31}));")
# Characters that cannot be seen. Joiners stay between letters and signs that they shape, as in Persian and emoji.
_INVISIBLE = re.compile(
    "[\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\x00]"
    "|(?<![^\x00-\x7f])[\u200c\u200d]+|[\u200c\u200d]+(?![^\x00-\x7f])"
)


def clean_caption(caption: str, cut: bool = False) -> str:
    """A caption with one space for each run of white space and none at its ends, without invisible characters (such as
    zero-width spaces), and with characters for HTML entities. The result stays as it is when it is cleaned again.

    Args:
        cut: cut a caption of more than MAX_LENGTH characters instead of raising ValueError.
    """
    caption = " ".join(caption.split())
    if len(caption) > MAX_LENGTH and not cut:
        raise ValueError(f"caption: expected at most {MAX_LENGTH:,} characters, got {len(caption):,}")
    caption = caption[:MAX_LENGTH].rstrip()
    # An entity may leave another one ("&amp;lt;"), so this goes on until nothing changes.
    while (cleaned := _clean_once(caption)) != caption:
        caption = cleaned
    return caption


def _clean_once(caption: str) -> str:
    if not caption.isascii() or "\0" in caption:
        caption = _INVISIBLE.sub("", caption)
    if "&" in caption:
        caption = _ENTITY.sub(_character, caption)
    return " ".join(caption.split())


def _character(entity: re.Match[str]) -> str:
    number, name = entity.groups()
    return html.unescape(f"&#{number};") if number else html5.get(f"{name};", entity[0])
