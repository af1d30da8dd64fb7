"""The whole path: a caption in, the best of many images out (section 2.6)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .config import Sampling
from .data.augment import center_crop_resize
from .data.batches import collate
from .distributed.world import check_device
from .figures import contact_sheet, save_image
from .files import sha256_of
from .models import CLIP, DALLE, DiscreteVAE, hash_of, load_model
from .models.precision import float32_by_default
from .sampling import ImagePrompt, leading
from .tokenizer import Tokenizer

BUILT_IN = Path(__file__).parent / "pretrained"  # one folder per model that ships with the package
BATCH = 64  # candidates sampled together
TOP = 8  # images that are kept, unless another number is given or there are fewer


def find_system(folder_or_name: str | Path) -> Path:
    """The folder of a system that training wrote, or of a built-in one by its name.

    Raises:
        FileNotFoundError: neither a folder nor a name.
    """
    folder = Path(folder_or_name)
    if not str(folder_or_name):  # else the current folder
        raise FileNotFoundError("model: expected a folder or a built-in name, got an empty one")
    if not folder.is_dir() and len(folder.parts) == 1:
        folder = BUILT_IN / folder_or_name
    if not folder.is_dir():
        names = ", ".join(sorted(p.name for p in BUILT_IN.glob("*/"))) or "none"
        raise FileNotFoundError(f"model: expected a folder or a built-in name ({names}), got {folder_or_name}")
    return folder


def load_tokenizer(system: Path) -> Tokenizer:
    """The tokenizer of a system; FileNotFoundError names the command that makes one."""
    return Tokenizer.load(_part(system, "tokenizer", "tokenizer.json"))


def load_dvae(system: Path) -> DiscreteVAE:
    """The dVAE of a system; FileNotFoundError names the command that makes one."""
    return load_model(_part(system, "dvae", "dvae.safetensors"), "dvae")


def load_clip(system: Path) -> CLIP:
    """The CLIP of a system; FileNotFoundError names the command that makes one."""
    return load_model(_part(system, "clip", "clip.safetensors"), "clip")


def fingerprint(system: Path, model: str) -> str:
    """Hash of the file of a system's ``dvae``, ``clip`` or ``dalle``."""
    return sha256_of(_part(system, model, f"{model}.safetensors"))


def _part(system: Path, name: str, file: str) -> Path:
    path = system / file
    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected {path}, got none; make it with: dalle-fast train {name}")
    return path


@dataclass(frozen=True)
class Result:
    """The best images for one caption, best first."""

    caption: str
    images: torch.Tensor  # float [top, 3, S, S] in [0, 1]
    scores: torch.Tensor  # [top], scaled cosine of image and caption

    def save(self, path: str | Path) -> None:
        """Write the images as one sheet with their scores."""
        save_image(contact_sheet(self.images, [f"{score:.2f}" for score in self.scores.tolist()]), path)


@dataclass(frozen=True)
class TextToImage:
    """A tokenizer and three models that were trained together."""

    tokenizer: Tokenizer
    dvae: DiscreteVAE
    dalle: DALLE
    clip: CLIP

    @classmethod
    def load(
        cls, folder_or_name: str | Path, weights: str = "float32", device: str | torch.device = "cpu"
    ) -> TextToImage:
        """Open a folder that training wrote, or a built-in model by its name.

        Args:
            weights: format of the weights that sampling reads on a CPU, as in ``DALLE.pack``: ``float32``, ``bfloat16``
                or ``int8``.
            device: where the models run, such as "cuda".

        Raises:
            FileNotFoundError: no such folder or name, or a part of it is missing.
            ValueError: the device is not there, a part is damaged, or the parts do not belong together.
        """
        place = check_device(device)
        folder = find_system(folder_or_name)
        tokenizer = load_tokenizer(folder)
        dvae, dalle, clip = (
            load_model(_part(folder, kind, f"{kind}.safetensors"), kind) for kind in ("dvae", "dalle", "clip")
        )
        for name, size in (("text_vocab", tokenizer.vocab_size), ("text_len", tokenizer.text_len)):
            if getattr(dalle.cfg, name) != size or getattr(clip.cfg, name) != size:
                raise ValueError(f"{name} in {folder}: expected the tokenizer's {size} in dalle and clip")
        grid = (dalle.cfg.height, dalle.cfg.width, dalle.cfg.image_vocab)
        if grid != (dvae.cfg.grid, dvae.cfg.grid, dvae.cfg.vocab_size):
            raise ValueError(f"image codes in {folder}: expected the dvae's grid and vocabulary in dalle, got {grid}")
        if clip.cfg.image_size != dvae.cfg.image_size:
            raise ValueError(f"image_size in {folder}: expected the dvae's {dvae.cfg.image_size} in clip")
        parts = {"tokenizer": tokenizer.fingerprint, "dvae": hash_of(dvae)}
        for name, model in (("dalle", dalle), ("clip", clip)):
            for part, expected in model.trained_with.items():
                if parts.get(part) != expected:
                    raise ValueError(f"{part} in {folder}: expected the one that {name} was trained with, got another")
        dalle.pack(weights)
        with torch.inference_mode(False):
            return cls(tokenizer, dvae.to(place), dalle.to(place), clip.to(place))

    @torch.no_grad()
    @float32_by_default()
    def __call__(
        self,
        caption: str,
        n: int = 64,
        top: int | None = None,
        sampling: Sampling = Sampling(),
        image_prompt: np.ndarray | None = None,
        keep_rows: int = 0,
        keep_columns: int = 0,
        truncate: bool = False,
    ) -> Result:
        """Sample n candidates for a caption and return the ``top`` that CLIP scores highest.

        Args:
            top: number of images to keep, 1 to n; None is 8, or n if that is less.
            sampling: temperature, top_k, top_p, guidance and seed.
            image_prompt: image, uint8 [H, W, 3], of which the first ``keep_rows`` rows and ``keep_columns`` columns of
                codes are kept; the rectangle below and right of them is sampled.
            truncate: cut a caption that has more tokens than the models read, as in training, instead of refusing it.

        Raises:
            TypeError: the caption is no string.
            ValueError: n and top, or the image prompt and the rows and columns to keep of it, do not fit each other;
                the caption is too long; the models give images or scores that are not finite.
        """
        if not isinstance(caption, str):
            raise TypeError(f"caption: expected one string, got {type(caption).__name__}; call once for each caption")
        if n < 1:
            raise ValueError(f"n: expected 1 or more, got {n}")
        top = min(TOP, n) if top is None else top
        if not 1 <= top <= n:
            raise ValueError(f"top: expected 1 to n = {n}, got {top}")
        text = self.tokenizer.encode([caption], truncate=truncate).to(self.dalle.device)
        prompt = None if image_prompt is None else self._prompt(image_prompt, keep_rows, keep_columns)
        if prompt is None and (keep_rows or keep_columns):
            raise ValueError("keep_rows, keep_columns: expected an image_prompt to keep them of, got none")
        seeds = torch.Generator().manual_seed(sampling.seed)
        images, scores = [], []
        for start in range(0, n, BATCH):
            seed = int(torch.randint(2**63 - 1, (), generator=seeds))
            codes = self.dalle.generate(
                text, n=min(BATCH, n - start), sampling=replace(sampling, seed=seed), image_prompt=prompt
            )
            images.append(self.dvae.decode(codes))
            scores.append(self.clip.score(images[-1], text))
            if not scores[-1].isfinite().all():
                raise ValueError("scores: expected finite numbers from clip, got NaN or infinity")
        best = torch.cat(scores).topk(top)
        return Result(caption, torch.cat(images)[best.indices], best.values)

    def _prompt(self, image: np.ndarray, rows: int, columns: int) -> ImagePrompt:
        """The codes of an image, and which of them to keep."""
        keep = leading(self.dvae.cfg.grid, self.dvae.cfg.grid, rows, columns)
        pixels = collate([{"image": center_crop_resize(image, self.dvae.cfg.image_size)}])["image"]
        return self.dvae.encode(pixels.to(self.dalle.device))[0], keep
