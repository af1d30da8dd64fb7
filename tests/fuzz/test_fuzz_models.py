"""Damaged and hostile model files: one ValueError that names the file, little memory, and no traceback.

``DALLE_FAST_FUZZ=1`` tries 1,000 mutations instead of 150.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_fast.config import CLIPConfig, DALLEConfig, DVAEConfig
from dalle_fast.models import CLIP, DALLE, DiscreteVAE, save_model

MUTATIONS = 1_000 if os.environ.get("DALLE_FAST_FUZZ") else 150
MODELS = {
    "dvae": (DiscreteVAE, DVAEConfig(image_size=8, vocab_size=4, n_hid=4, n_init=4, groups=(1, 2), n_blk_per_group=1)),
    "dalle": (
        DALLE,
        DALLEConfig(
            text_vocab=8, text_len=4, image_vocab=4, height=2, width=2, d_model=8, n_layer=2, head_dim=4, kernel=3
        ),
    ),
    "clip": (
        CLIP,
        CLIPConfig(
            image_size=8, patch_size=4, vision_width=8, vision_layers=1, text_vocab=8, text_len=4, text_width=8,
            text_layers=1, head_dim=4, embed_dim=4,
        ),
    ),
}  # fmt: skip
HOSTILE: list[Any] = [
    None, "", "8", True, [], [8], {}, -1, 0, 0.5, 8.0, float("nan"), float("inf"), 3, 10**6, 10**9, 2**31, 2**63,
    10**30, 10**400, "x" * 10_000,
]  # fmt: skip

# In a process of its own, which may take 1 GB beyond what torch takes: a file is a line of its outcome.
CHILD = """
import resource, sys
from dalle_fast.models import load_model
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**30, mapped + 2**30))
for path in sys.stdin.read().splitlines():
    try:
        load_model(path)
        print("loaded")
    except ValueError as error:
        print("refused" if path in str(error) and len(str(error)) < 1000 else f"unclear: {error!r}")
    except BaseException as error:
        print(f"wrong: {type(error).__name__}: {error}".replace(chr(10), " ")[:300])
"""

Header = dict[str, Any]


def split(content: bytes) -> tuple[Header, bytes]:
    n = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + n]), content[8 + n :]


def join(header: Header, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def in_config(change: Callable[[dict[str, Any], random.Random], None]) -> Callable[[bytes, random.Random], bytes]:
    def mutate(content: bytes, rng: random.Random) -> bytes:
        header, data = split(content)
        config = json.loads(header["__metadata__"]["config"])
        change(config, rng)
        header["__metadata__"]["config"] = json.dumps(config)
        return join(header, data)

    return mutate


def other_value(config: dict[str, Any], rng: random.Random) -> None:
    name = rng.choice([name for name in sorted(config) if name not in ("gain", "guidance")])
    config[name] = rng.choice([value for value in HOSTILE if value != config[name]])


def list_with_other_value(config: dict[str, Any], rng: random.Random) -> None:
    name = "groups" if "groups" in config else rng.choice(sorted(config))
    config[name] = [1, rng.choice(HOSTILE[:10] + HOSTILE[-6:])]


def other_factor(config: dict[str, Any], rng: random.Random) -> None:
    name = "gain" if "gain" in config else "guidance" if "guidance" in config else "head_dim"
    config[name] = rng.choice(["1", [], {}, True, float("nan"), float("-inf"), 10**400])


def unknown_key(config: dict[str, Any], rng: random.Random) -> None:
    config[rng.choice(["new_option", "", "__class__", "self"])] = 1


def missing_key(config: dict[str, Any], rng: random.Random) -> None:
    del config[rng.choice(sorted(config))]


def another_config(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    header["__metadata__"]["config"] = rng.choice(["", "null", "[]", "3", "{", "[" * 100_000, '"x"', "{}", "\ud800"])
    return join(header, data)


def no_config(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    del header["__metadata__"][rng.choice(["config", "kind"])]
    return join(header, data)


def another_kind(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    kinds = sorted({"dvae", "dalle", "clip", "", "x" * 10_000} - {header["__metadata__"]["kind"]})
    header["__metadata__"]["kind"] = rng.choice(kinds)
    return join(header, data)


def a_tensor(header: Header, rng: random.Random) -> str:
    return rng.choice([name for name in sorted(header) if name != "__metadata__"])


def without_tensor(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    del header[a_tensor(header, rng)]  # the data then has a hole, or an end without an owner
    return join(header, data)


def renamed_tensor(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    name = a_tensor(header, rng)
    header[rng.choice([f"{name}2", "", "x" * 5_000])] = header.pop(name)
    return join(header, data)


def extra_tensor(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    header["extra"] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
    return join(header, data + bytes(8))


def another_shape(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    entry = header[a_tensor(header, rng)]
    entry["shape"] = rng.choice([[*entry["shape"], 1], [1, *entry["shape"]], [0], [2**62, 4], [-1], [10**9], None])
    return join(header, data)


def another_dtype(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    header[a_tensor(header, rng)]["dtype"] = rng.choice(["I32", "U32", "F16", "F64", "BOOL", "F8_E4M3", "C64", "?"])
    return join(header, data)


def not_finite(content: bytes, rng: random.Random) -> bytes:
    header, data = split(content)
    start, end = header[a_tensor(header, rng)]["data_offsets"]
    at = start + 4 * rng.randrange((end - start) // 4)
    value = torch.tensor(rng.choice([float("nan"), float("inf"), float("-inf")])).numpy().tobytes()
    return join(header, data[:at] + value + data[at + 4 :])


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(content)), len(content) - 1])]


def another_length(content: bytes, rng: random.Random) -> bytes:
    return rng.choice([0, 1, 2**20, 2**40, 2**63, 2**64 - 1]).to_bytes(8, "little") + content[8:]


def flipped_header(content: bytes, rng: random.Random) -> bytes:
    """Damage anywhere in the header, which may leave another file that is right."""
    end = 8 + int.from_bytes(content[:8], "little")
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        damaged[rng.randrange(end)] = rng.randrange(256)
    return bytes(damaged)


REFUSED = [
    *map(in_config, [other_value, other_value, other_value, list_with_other_value, other_factor]),
    *map(in_config, [unknown_key, missing_key]),
    another_config, no_config, another_kind, without_tensor, renamed_tensor, extra_tensor, another_shape, another_dtype,
    not_finite, cut, another_length,
]  # fmt: skip


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("models")
    for kind, (model, cfg) in MODELS.items():
        save_model(model(cfg), folder / kind)
    return {kind: (folder / kind).read_bytes() for kind in MODELS}


def outcomes(paths: list[Path]) -> list[str]:
    lines = "\n".join(map(str, paths))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = [sys.executable, "-c", CHILD]
    return subprocess.run(
        child, input=lines, capture_output=True, text=True, timeout=500, env=environment
    ).stdout.splitlines()


def test_damaged_files_are_refused(contents, tmp_path):
    rng, paths, wrong = random.Random(0), [], {}
    mutations = [*REFUSED, flipped_header]
    for i in range(MUTATIONS):
        path = tmp_path / f"{i}.safetensors"
        path.write_bytes(mutations[i % len(mutations)](contents[rng.choice(sorted(contents))], rng))
        paths.append(path)
    said = outcomes(paths)
    assert len(said) == len(paths), said[-1:]
    for i, outcome in enumerate(said):
        mutation = mutations[i % len(mutations)]
        if outcome != "refused" and not (mutation is flipped_header and outcome == "loaded"):
            wrong[f"{i} {mutation.__qualname__}"] = outcome
    assert not wrong


def test_undamaged_files_are_read(contents, tmp_path):
    paths = []
    for kind, content in contents.items():
        paths.append(tmp_path / kind)
        paths[-1].write_bytes(content)
    assert outcomes(paths) == ["loaded"] * 3


TOO_LARGE = [
    ("dalle", {"n_layer": 10**6}),
    ("dalle", {"text_vocab": 10**9}),
    ("dvae", {"n_blk_per_group": 10**6}),
    ("dvae", {"vocab_size": 10**9}),
    ("clip", {"text_layers": 10**6}),
    ("clip", {"embed_dim": 2**31 - 1, "vision_width": 2**31 - 4}),
]


def test_sizes_that_no_file_has_are_refused_at_once(contents, tmp_path):
    paths = []
    for i, (kind, change) in enumerate(TOO_LARGE):
        mutate = in_config(lambda config, rng, change=change: config.update(change))
        paths.append(tmp_path / f"{i}.safetensors")
        paths[-1].write_bytes(mutate(contents[kind], random.Random(0)))
    assert outcomes(paths) == ["refused"] * len(paths)


@pytest.mark.parametrize("mutation", [in_config(unknown_key), another_shape, not_finite, cut])
def test_a_damaged_file_is_one_line_at_the_command_line(mutation, contents, tmp_path, cli, capsys):
    path = tmp_path / "dvae.safetensors"
    path.write_bytes(mutation(contents["dvae"], random.Random(1)))
    image = Path(__file__).parents[2] / "docs" / "sheet.png"
    args = ["reconstruct", str(image), "--model", str(tmp_path), "--out", str(tmp_path / "out.png")]
    assert cli.main(args) == 2
    said = capsys.readouterr().err
    assert said.startswith("dalle-fast: ") and said.count("\n") == 1 and str(path) in said
