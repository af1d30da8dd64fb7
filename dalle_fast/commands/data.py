"""Commands that build and clean datasets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..data.filters import Filters
from .common import Model, Source, open_source, report_skipped

FILTERS = Filters()


def encode(
    data: Source,
    out: Path,
    model: Model = "tiny",
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
) -> None:
    """Encode the images of a source into codes once, ahead of training the transformer.

    An interrupted run resumes when started again. Under torchrun the processes share the work.

    Args:
        out: New folder for codes and captions, a source for ``train dalle --data``.
        draws: Augmentations per image, one per epoch of training in turn; 1 takes the central square instead.
        seed: Seed of the augmentations.
        batch_size: Images per batch.
        workers: Worker processes that read and augment images; 0 does it in the main process.
        device: Device for the dVAE.
    """
    from ..data import Encoding, JobOptions, encode_pairs
    from ..distributed.world import device_of_process, this_process
    from ..pipeline import find_system, fingerprint, load_dvae

    where = device_of_process(device)
    system = find_system(model)
    dvae, (rank, ranks) = load_dvae(system).to(where), this_process()
    pairs = open_source(data)
    encoded = encode_pairs(
        out,
        pairs,
        lambda images: dvae.encode(images.to(where)),
        Encoding(
            fingerprint=fingerprint(system, "dvae"),
            image_size=dvae.cfg.image_size,
            grid=(dvae.cfg.grid, dvae.cfg.grid),
            draws=draws,
            seed=seed,
        ),
        JobOptions(batch_size=batch_size, workers=workers, rank=rank, ranks=ranks),
    )
    if encoded is None:
        print(f"{out}: this process has done its part; others have not yet")
        return
    if broken := encoded.skipped_count - len(pairs.skipped):
        print(f"{broken} broken samples left out, named in {out / 'skipped.jsonl'}", file=sys.stderr)
    each = f" in {draws} draws" if draws > 1 else ""
    print(f"{out}: {len(encoded)} images as {dvae.cfg.grid} x {dvae.cfg.grid} codes{each}")


def emoji(out: Path, size: int = 64, language: str = "en", font: Path | None = None) -> None:
    """Build a dataset of emoji from Noto Color Emoji, captioned with their names, in folders train and val.

    Args:
        out: New folder.
        size: Edge of the images in pixels.
        language: Language of the captions, such as en, de, ja.
        font: Font file; none searches for it.
    """
    from ..data.emoji import make_emoji_corpus

    make_emoji_corpus(out, size, language, font)


def index(shards: Annotated[Positional[str], arg(metavar="SHARDS")], workers: int | None = None) -> None:
    """Index tar shards ahead of training, which otherwise does it when it starts.

    Args:
        shards: A .tar file, a folder of them, or a glob such as "shards/*.tar".
        workers: Worker processes; none is one per processor.
    """
    from ..data.open import find_shards
    from ..data.sources.tar import ShardPairs

    paths = find_shards(shards)
    if not paths:
        raise ValueError(f"shards: expected a .tar, a folder of them or a glob, got {shards}")
    pairs = ShardPairs(paths, workers)
    report_skipped(shards, pairs)
    print(f"{shards}: {len(pairs)} pairs in {len(paths)} shards")


def filter_(data: Source, out: Path, filters: Annotated[Filters, arg(name="")] = FILTERS, workers: int = 0) -> None:
    """Filter pairs as the paper did: by length, language and boilerplate of captions, and aspect ratio of images.

    No image is copied or decoded. The file dropped.jsonl names each pair that was left out, and the reason.

    Args:
        out: New folder, a source of the pairs that are kept.
        workers: Worker processes; 0 does it in the main process.
    """
    from ..data import filter_pairs

    pairs = open_source(data)
    _print_view(out, len(pairs), filter_pairs(out, data, pairs, filters, workers))


def dedup(
    data: Source,
    out: Path,
    model: Model = "tiny",
    threshold: float = 0.98,
    embeddings: Path | None = None,
    exact_up_to: int = 1_000_000,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
) -> None:
    """Remove near-duplicate images, found by their CLIP embeddings; the first of each group is kept.

    No image is copied. The file dropped.jsonl names each duplicate, and the image kept in its place. An interrupted run
    resumes when started again; under torchrun the processes share the embedding.

    Args:
        out: New folder, a source of the pairs that are kept.
        threshold: Least cosine similarity of near-duplicates; depends on the CLIP.
        embeddings: Folder for the embeddings; none is OUT.embeddings.
        exact_up_to: Most pairs for an exhaustive comparison; for more, an approximate index is used (usearch).
        batch_size: Images per batch.
        workers: Worker processes that read images; 0 does it in the main process.
        device: Device for CLIP.
    """
    from ..data import Embedding, JobOptions, drop_duplicates, embed_pairs
    from ..distributed.world import device_of_process, this_process
    from ..pipeline import find_system, fingerprint, load_clip

    where = device_of_process(device)
    system = find_system(model)
    clip, (rank, ranks) = load_clip(system).to(where).requires_grad_(False), this_process()
    pairs = open_source(data)
    folder = embeddings or out.with_name(out.name + ".embeddings")
    complete = embed_pairs(
        folder,
        pairs,
        lambda images: clip.encode_image(images.to(where)),
        Embedding(fingerprint=fingerprint(system, "clip"), image_size=clip.cfg.image_size),
        JobOptions(batch_size=batch_size, workers=workers, rank=rank, ranks=ranks),
    )
    if complete and rank == 0:
        _print_view(out, len(pairs), drop_duplicates(out, data, pairs, folder, threshold, exact_up_to, str(where)))
    else:
        print(f"{folder}: this process has done its part; when all have, run the same command again")


def _print_view(out: Path, pairs: int, dropped: dict[str, int]) -> None:
    print(f"{out}: {pairs - sum(dropped.values()):,} of {pairs:,} pairs kept")
    for reason, count in sorted(dropped.items(), key=lambda item: -item[1]):
        print(f"{count:>12,}  {reason}")
