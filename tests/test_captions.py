"""The clean form of captions: white space, invisible characters and HTML entities do not matter."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_fast.captions import MAX_LENGTH, clean_caption


@pytest.mark.parametrize(
    "caption",
    [
        "a red & blue box",
        "a  red   & blue box",
        "\ta red\n& blue\r\nbox \n",
        "\ufeffa red\u00a0& blue\u3000box\u2028",
        "a red\x85&\x1fblue\x0bbox\0",
        "a re\u200bd & b\u00adlue\u2060 box\u200d",
        "a red &amp; blue box",
        "a red &#38; blue&nbsp;box",
        "a&#32;red &#x26;&nbsp; &#98;lue box&#8203;",
        "a red &amp;amp;amp; blue box",
        "a red &am&#112;; blue box",
        "a red &am&zwj;p; blue box",
        "  \u200b a red & blue box \u200b \u200e",
    ],
)
def test_one_form(caption: str) -> None:
    assert clean_caption(caption) == "a red & blue box"


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "R&D",
        "fish & chips;",
        "&foo; &; &#; &#x;",
        "?a=1&copy=2",
        "1 < 2",
        "\u0645\u06cc\u200c\u062e",
        "👩\u200d🚀",
        "日本 ü",
    ],
)
def test_clean_captions_stay(caption: str) -> None:
    assert clean_caption(caption) == caption


@settings(max_examples=500, deadline=None)
@given(
    st.lists(
        st.sampled_from([*"&;#x3859am \u200b\u200d\u200c\u00adé", "amp;", "&#", "&lt;", "&zwj;", "&nbsp;"]), max_size=40
    ).map("".join)
    | st.text()
)
def test_cleaning_twice_changes_nothing(caption: str) -> None:
    cleaned = clean_caption(caption)
    assert clean_caption(cleaned) == cleaned == " ".join(cleaned.split())


@pytest.mark.parametrize("piece", ["&", "&amp;", "amp;", "&#3", "&a", "\u200d", " ", "x", "é\u200d", ";", "&am&zwj;"])
def test_no_caption_takes_long(piece: str) -> None:
    start = time.perf_counter()
    clean_caption("&" + piece * (1_000_000 // len(piece)) + ";", cut=True)
    assert time.perf_counter() - start < 2


def test_long_captions() -> None:
    assert clean_caption("x" * MAX_LENGTH) == "x" * MAX_LENGTH
    assert clean_caption("x" * (MAX_LENGTH + 1), cut=True) == "x" * MAX_LENGTH
    assert clean_caption(" " * 1_000_000 + "x") == "x"
    with pytest.raises(ValueError, match="caption: expected at most 10,000 characters, got 10,001"):
        clean_caption("x" * (MAX_LENGTH + 1))
