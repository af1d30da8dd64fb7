"""Settings of ``data filter``. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

# The languages that are told apart: the fewer, the less often a short caption is taken for one of another language.
LANGUAGES = (
    "ar", "cs", "da", "de", "en", "es", "fi", "fr", "he", "hu", "id", "it", "ja", "ko", "nl", "no", "pl", "pt", "ru",
    "sv", "tr", "uk", "vi", "zh",
)  # fmt: skip


@dataclass(frozen=True)
class Filters:
    """Conditions for keeping a pair (appendix C). The paper gives a number for the aspect ratio only."""

    min_words: int = 3  # of a caption, without boilerplate
    language: str = "en"  # of captions, such as en, de, ja; none keeps all
    max_repeats: int = 10  # images with the same caption, as for ALIGN (arXiv 2102.05918, section 3)
    max_aspect: float = 2.0  # of the longer to the shorter side

    def __post_init__(self) -> None:
        for name, least in (("min_words", 0), ("max_repeats", 1), ("max_aspect", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if self.language not in (*LANGUAGES, "none"):
            raise ValueError(f"language: expected one of {', '.join(LANGUAGES)} or none, got {self.language!r}")
