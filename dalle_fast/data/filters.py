"""Which pairs ``data filter`` keeps: the settings. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

# What captions are taken to be in: with fewer languages to tell apart, short captions are taken for another less often.
LANGUAGES = (
    "ar", "cs", "da", "de", "en", "es", "fi", "fr", "he", "hu", "id", "it", "ja", "ko", "nl", "no", "pl", "pt", "ru",
    "sv", "tr", "uk", "vi", "zh",
)  # fmt: skip


@dataclass(frozen=True)
class Filters:
    """Which pairs to keep (appendix C). The aspect ratio is the paper's; of the others it gives no numbers."""

    min_words: int = 3  # of a caption, beside boilerplate
    language: str = "en"  # of captions, such as en, de, ja; none keeps all
    max_repeats: int = 10  # pictures with the same caption, as for ALIGN (arXiv 2102.05918, section 3)
    max_aspect: float = 2.0  # of the longer to the shorter side

    def __post_init__(self) -> None:
        for name, least in (("min_words", 0), ("max_repeats", 1), ("max_aspect", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if self.language not in (*LANGUAGES, "none"):
            raise ValueError(f"language: expected one of {', '.join(LANGUAGES)} or none, got {self.language!r}")
