"""The command line: ``dalle-fast --help``. Each command is a function; what needs torch is imported inside it."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Sequence
from functools import reduce
from importlib.metadata import PackageNotFoundError, version
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg, subcommand

from .config import DEMO_STEPS, PRESETS, CLIPConfig, DALLEConfig, DVAEConfig
from .training import TrainingDiverged, TrainingStopped
from .training.config import TRAIN_PRESETS, TrainCLIP, TrainDALLE, TrainDVAE

if TYPE_CHECKING:
    import numpy as np

    from .data import EncodedPairs, Pairs
    from .models import DiscreteVAE
    from .tokenizer import Tokenizer

Source = Annotated[str, arg(help="Source of pairs: a folder, .csv, .jsonl or .tar, or scenes, which are drawn.")]
HeldOut = Annotated[str | None, arg(help="Source of held-out pairs.")]
System = Annotated[Path, arg(help="Folder of the system. A training that was stopped goes on from there.")]
Model = Annotated[str, arg(help="Folder that training wrote, or the name of a built-in model.")]
Preset = Annotated[
    Literal["tiny", "1.2B", "2.8B", "5.6B", "12B"], arg(help="Sizes and settings that the options below change.")
]
DOC = "DALL-E (2021): train it, and draw pictures for captions."
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


# ---------------------------------------------------------------------------------------------- make and use pictures


def demo(
    out: Path = Path("demo-out"), pairs: int = 20_000, captions: int = 40, steps: tuple[int, int, int] = DEMO_STEPS
) -> None:
    """Train a small system on drawn scenes from nothing, let it draw, and judge it. About 15 minutes on two cores.

    Args:
        out: Folder for the models, pictures and metrics. A demo that was stopped goes on from there.
        pairs: Scenes drawn for training.
        captions: Captions to judge, of those seen in training and of those held out.
        steps: Updates of the dVAE, of the transformer, of the reranker.
    """
    from .demo import run

    print(json.dumps(run(out, pairs, captions, steps), indent=2))


def generate(
    caption: Positional[str],
    out: Path = Path("out.png"),
    model: Model = "tiny",
    n: int = 64,
    top: int = 8,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float | None = None,
    weights: Literal["float32", "bfloat16", "int8"] = "float32",
    image_prompt: Path | None = None,
    rows: int = 0,
    columns: int = 0,
) -> None:
    """Draw pictures for a caption and keep those that fit it best.

    Args:
        caption: What to draw, such as "a red circle above a blue square".
        out: Picture to write, the best first.
        n: Candidates to draw.
        top: Candidates to keep, chosen by CLIP.
        seed: The same seed draws the same pictures again.
        temperature: Below 1 is more likely, above 1 more varied.
        top_k: Draw each code from the so many likeliest.
        top_p: Draw each code from the likeliest that add up to this probability.
        guidance: Weight of the caption against no caption; 1 is no guidance, none is the model's own weight.
        weights: What the transformer's weights are rounded to for drawing on a CPU; fewer bits are faster.
        image_prompt: Picture to go on from.
        rows: Rows of codes of the image prompt to keep.
        columns: Columns of codes of the image prompt to keep.
    """
    _check_picture_name(out)
    picture = None if image_prompt is None else _read_picture(image_prompt)
    from .pipeline import TextToImage

    pipe = TextToImage.load(model, weights)
    result = pipe(caption, n, top, seed, temperature, top_k, top_p, guidance, picture, rows, columns)
    result.save(out)
    print(f"{out}: best {top} of {n}, scores {', '.join(f'{score:.2f}' for score in result.scores.tolist())}")


def reconstruct(images: Positional[tuple[Path, ...]], out: Path = Path("out.png"), model: Model = "tiny") -> None:
    """Encode pictures and decode them again: how much the image codes can say.

    Args:
        images: Picture files.
        out: Picture to write: each picture beside its reconstruction.
    """
    _check_picture_name(out)
    if not images:
        raise ValueError("images: expected at least one picture, got none")
    pictures = [_read_picture(path) for path in images]
    import torch

    from .data import center_crop_resize, collate
    from .sheet import contact_sheet, save_image

    dvae = _load_dvae(_system(model))
    originals = collate([{"image": center_crop_resize(picture, dvae.cfg.image_size)} for picture in pictures])["image"]
    copies = dvae.decode(dvae.encode(originals))
    pairs = torch.stack([originals, copies], 1).flatten(0, 1)
    labels = [label for path in images for label in (path.name, "reconstruction")]
    save_image(contact_sheet(pairs, labels), out)
    print(f"{out}: mean squared error {(copies - originals).square().mean().item():.5f}")


def encode(data: Source, out: Path, model: Model = "tiny", batch_size: int = 64) -> None:
    """Encode the images of a source once, so that training the transformer need not do it again and again.

    Args:
        out: New folder for codes and captions; ``train dalle --data`` takes it.
        batch_size: Images encoded together.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    from .data import BrokenSample, center_crop_resize, collate, write_encoded

    dvae = _load_dvae(_system(model))
    pairs = _open(data)
    broken: list[str] = []

    def samples() -> Iterator[tuple[np.ndarray, str]]:
        batch: list[dict[str, Any]] = []
        for i in range(len(pairs)):
            try:
                image, caption = pairs[i]
                batch.append({"image": center_crop_resize(image, dvae.cfg.image_size), "caption": caption})
            except BrokenSample as error:
                broken.append(str(error))
            if batch and (len(batch) == batch_size or i == len(pairs) - 1):
                whole = collate(batch)
                yield from zip(dvae.encode(whole["image"]).numpy(), whole["caption"], strict=True)
                batch.clear()

    count = write_encoded(out, samples(), _fingerprint(_system(model)))
    _report("broken samples", broken)
    print(f"{out}: {count} images as {dvae.cfg.grid} x {dvae.cfg.grid} codes")


def plot(out: Positional[Path]) -> None:
    """Draw the losses of a system's trainings, and the gradient scales of one in 16 bits.

    Args:
        out: Folder that training writes.
    """
    from .plots import draw_logs

    print(*draw_logs(out), sep="\n")


def info() -> None:
    """Print versions, the kernels of this install, and the sizes of the presets."""
    import torch

    from .models import CLIP, DALLE, DiscreteVAE
    from .ops import backend

    print(f"python {platform.python_version()}, {platform.platform()}, {torch.get_num_threads()} threads")
    for package in ("dalle-fast", "torch", "numpy", "tokenizers", "safetensors", "pillow"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            print(f"{package} not installed as a package")
    print(f"kernels:\n  {str(backend()).replace(chr(10), chr(10) + '  ')}")
    print(f"{'preset':8}{'dvae':>16}{'clip':>16}{'dalle':>18}  parameters")
    for name, cfg in PRESETS.items():
        with torch.device("meta"):
            models = (DiscreteVAE(cfg.dvae), CLIP(cfg.clip), DALLE(cfg.dalle))
        dvae, clip, dalle = (sum(p.numel() for p in model.parameters()) for model in models)
        print(f"{name:8}{dvae:>16,}{clip:>16,}{dalle:>18,}")


def plan(
    preset: Preset = "tiny",
    gpus: int = 1,
    machines: int = 1,
    batch: int | None = None,
    memory: float = 16.0,
    rank: int | None = None,
) -> None:
    """Reckon what training a transformer as the paper did takes of each GPU, without taking it; fail if it cannot fit.

    Args:
        gpus: Of a machine; they share the parameters.
        machines: Each has all parameters; they exchange gradients.
        batch: Samples of an update, all GPUs together; none is the preset's.
        memory: GB of a GPU.
        rank: Of PowerSGD between machines; none is the paper's.
    """
    from .training.plan import GB, plan_paper, what_fits

    cfg = PRESETS[preset].dalle
    batch = TRAIN_PRESETS[preset].dalle.batch_size if batch is None else batch
    reckoned = plan_paper(cfg, batch, gpus, machines, memory * GB, rank)
    print(f"{preset}: {reckoned}")
    if not reckoned.fits:
        ways = what_fits(cfg, batch, gpus, machines, memory * GB, rank)
        got = f"{reckoned.total / GB:.2f} GB"
        raise ValueError(f"memory: expected a plan that fits, got one of {got}; what would fit is {ways}")


def data(
    corpus: Positional[Literal["emoji"]], out: Path, size: int = 64, language: str = "en", font: Path | None = None
) -> None:
    """Make a corpus: the emoji of Noto Color Emoji with their names, in folders train and val.

    Args:
        corpus: Which corpus.
        out: New folder.
        size: Edge of the pictures in pixels.
        language: Of the captions, such as en, de, ja.
        font: The font's file, where it is not found by itself.
    """
    from .data.emoji import make_emoji_corpus

    make_emoji_corpus(out, size, language, font)


# ---------------------------------------------------------------------------------------------- train


def training_commands(preset: str) -> dict[str, Any]:
    """The commands of ``train``, with the values of a preset as defaults."""
    sizes, settings = PRESETS[preset], TRAIN_PRESETS[preset]

    def tokenizer(
        data: Source,
        out: System,
        preset: Preset = "tiny",
        vocab_size: int = sizes.dalle.text_vocab,
        text_len: int = sizes.dalle.text_len,
    ) -> None:
        """Learn the text vocabulary from captions. The first of the four to train.

        Args:
            vocab_size: Text tokens, the 256 bytes included.
            text_len: Tokens of a caption, padding included.
        """
        from .training import train_tokenizer

        pairs = _open(data)
        train_tokenizer(pairs.captions(), out, vocab_size, text_len)
        print(f"{out / 'tokenizer.json'}: {vocab_size} tokens from {len(pairs)} captions")

    def dvae(
        data: Source,
        out: System,
        val: HeldOut = None,
        preset: Preset = "tiny",
        model: DVAEConfig = sizes.dvae,
        train: TrainDVAE = settings.dvae,
    ) -> None:
        """Learn image codes (stage 1)."""
        from .training import train_dvae

        _, metrics = train_dvae(_open(data), val and _open(val), model, train, out)
        _print_metrics(out / "dvae.safetensors", metrics)

    def clip(
        data: Source,
        out: System,
        val: HeldOut = None,
        preset: Preset = "tiny",
        model: CLIPConfig = sizes.clip,
        train: TrainCLIP = settings.clip,
    ) -> None:
        """Learn which caption fits which image, to choose among candidates. Needs the tokenizer."""
        from .training import train_clip

        _, metrics = train_clip(_open(data), val and _open(val), _load_tokenizer(out), model, train, out)
        _print_metrics(out / "clip.safetensors", metrics)

    def dalle(
        data: Source,
        out: System,
        val: HeldOut = None,
        preset: Preset = "tiny",
        model: DALLEConfig = sizes.dalle,
        train: TrainDALLE = settings.dalle,
    ) -> None:
        """Learn to continue captions with image codes (stage 2). Needs the tokenizer and the dVAE.

        The sources may also be folders that ``encode`` wrote.
        """
        from .training import train_dalle

        tokenizer, vae = _load_tokenizer(out), _load_dvae(out)
        pairs, held_out = _open_or_encoded(data, out), val and _open_or_encoded(val, out)
        _, metrics = train_dalle(pairs, held_out, tokenizer, model, train, out, vae)
        _print_metrics(out / "dalle.safetensors", metrics)

    return {"tokenizer": tokenizer, "dvae": dvae, "clip": clip, "dalle": dalle}


# ---------------------------------------------------------------------------------------------- parts


def _check_picture_name(path: Path) -> None:
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"out: expected a name that ends in {', '.join(PICTURES)}, got {path}")


def _read_picture(path: Path) -> np.ndarray:
    """The pixels of a file, uint8 [H, W, 3]."""
    from .data.image import decode_image

    content = path.read_bytes()
    try:
        return decode_image(content)
    except Exception as error:  # on damaged bytes Pillow's decoders raise nearly anything
        raise ValueError(f"picture: expected an image file, got {path} ({error})") from error


def _report(what: str, names: Sequence[object]) -> None:
    """Say on stderr what was left out."""
    if names:
        print(f"{len(names)} {what} left out, the first: {names[0]}", file=sys.stderr)


def _open(source: str) -> Pairs:
    from .data import open_pairs

    pairs = open_pairs(source)
    _report(f"samples of {source}", [f"{name}: {reason}" for name, reason in pairs.skipped])
    return pairs


def _open_or_encoded(source: str, system: Path) -> Pairs | EncodedPairs:
    """A source of images, or codes that the dVAE of this system made."""
    from .data import EncodedPairs

    if not (Path(source) / "meta.json").is_file():
        return _open(source)
    pairs = EncodedPairs(source)
    if pairs.fingerprint != _fingerprint(system):
        raise ValueError(f"data: expected codes of the dVAE in {system}, got another dVAE's in {source}")
    return pairs


def _system(model: str) -> Path:
    """The folder of a system, given by itself or by the name of a built-in one."""
    from .pipeline import find_system

    return find_system(model)


def _load_tokenizer(system: Path) -> Tokenizer:
    from .tokenizer import Tokenizer

    path = system / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer: expected {path}, got none; make it with: dalle-fast train tokenizer")
    return Tokenizer.load(path)


def _load_dvae(system: Path) -> DiscreteVAE:
    from .models import load_model

    path = system / "dvae.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"dvae: expected {path}, got none; make it with: dalle-fast train dvae")
    return load_model(path, "dvae")


def _fingerprint(system: Path) -> str:
    """Which dVAE codes are from: the hash of its file."""
    from .data.encoded import sha256_of

    return sha256_of(system / "dvae.safetensors")


def _print_metrics(path: Path, metrics: dict[str, float]) -> None:
    print(f"{path}: " + ", ".join(f"{name} {value:.5g}" for name, value in metrics.items()))


def _parse(args: Sequence[str]) -> None:
    """Find the command that the arguments name, and run it."""
    top = {"demo": demo, "generate": generate, "reconstruct": reconstruct, "encode": encode, "data": data}
    top |= {"plot": plot, "plan": plan, "info": info}
    training = training_commands(_preset(args))
    every = top | {f"train {name}": function for name, function in training.items()}
    for words in (1, 2):
        name = " ".join(args[:words])
        if name in every:
            tyro.cli(every[name], prog=f"dalle-fast {name}", args=args[words:])
            return
    # Help, or a word that is no command: tyro knows what to say.
    train = subcommand("train", description="Train one of the four parts of a system.")
    tyro.cli(_union(top) | Annotated[_union(training), train], prog="dalle-fast", description=DOC, args=args)


def _union(commands: dict[str, Any]) -> Any:
    """One type for tyro: any of these subcommands."""
    return reduce(or_, (Annotated[Any, subcommand(name, constructor=f)] for name, f in commands.items()))


def _preset(args: Sequence[str]) -> str:
    """The preset that the arguments name; needed before they are parsed, for it decides the defaults."""
    for i, word in enumerate(args):
        name, _, value = word.partition("=")
        if name == "--preset":
            value = value or (args[i + 1] if i + 1 < len(args) else "")
            return value if value in PRESETS else "tiny"
    return "tiny"


def main(args: Sequence[str] | None = None) -> int:
    """Run a command; its exit code: 0, 2 for bad input, 128 + the signal for a training that was stopped."""
    args = sys.argv[1:] if args is None else args
    try:
        _parse(args)
    except TrainingStopped as stopped:
        print(f"dalle-fast: {stopped}; the same command goes on from there", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError, TrainingDiverged) as error:
        print(f"dalle-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
