"""The emulation that runs CUDA kernels without a GPU (tests/cuda_on_cpu): kernels it must run correctly or refuse."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulation switches stacks on x86-64 only")

ROOT = Path(__file__).parents[1]
SHIM = ROOT / "tests" / "cuda_on_cpu"


def build(folder, *sanitize):
    files = [SHIM / "check.cpp", SHIM / "cuda_on_cpu.cpp"]
    include = [f"-I{SHIM}", f"-I{ROOT / 'csrc'}"]  # the emulation's headers come first
    command = ["g++", "-std=c++17", "-O1", "-g1", "-Wall", *sanitize, *include]
    subprocess.run([*command, *files, "-o", folder / "check"], check=True)
    return lambda name: subprocess.run([folder / "check", name], capture_output=True, text=True)


@pytest.fixture(scope="module")
def check(tmp_path_factory):
    sanitize = ["-fsanitize=address,undefined", "-fsanitize-sections=cuda_on_cpu_shared"]
    return build(tmp_path_factory.mktemp("addresses"), *sanitize)


@pytest.fixture(scope="module")
def check_races(tmp_path_factory):
    check = build(tmp_path_factory.mktemp("races"), "-fsanitize=thread")
    if "FATAL: ThreadSanitizer" in (reason := check("early_return").stderr):  # Linux may randomise addresses too far
        pytest.skip(reason)
    return check


def numbers(result):
    assert result.returncode == 0, result.stderr + result.stdout
    return [float(x) for x in result.stdout.split()]


def test_block_sum(check):
    assert numbers(check("block_sum")) == [sum(range(96)), sum(range(96, 192))]


def test_collectives(check):
    wanted = [5 + 100 * max(i - 1, 0) + 10000 * (i + 4 if i % 8 < 4 else i) for i in range(32)]
    assert numbers(check("collectives")) == wanted


def test_threads_that_returned_are_counted_out(check):
    assert numbers(check("early_return")) == [1] * 40 + [0] * 24


def test_shared_memory_is_nan_in_every_block(check):
    assert check("stale_shared").stdout.split() == ["-nan"] * 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("barrier_of_some", "deadlock in block (0, 0, 0): of 64 threads 40 wait at __syncthreads, 24 in a warp"),
        ("shuffle_of_some", "deadlock in block (0, 0, 0): of 64 threads 0 wait at __syncthreads, 31 in a warp"),
        ("different_collectives", "lanes of a warp meet in different collectives, in thread (7, 0, 0) of block"),
        ("part_of_a_warp", "a warp collective needs all 32 lanes, in thread (0, 0, 0) of block (0, 0, 0)"),
        ("odd_block", "grid (2, 1, 1) of blocks (40, 1, 1): expected whole warps, at most 1024 threads"),
        ("much_shared", "a block cannot have 233472 bytes of shared memory"),
    ],
)
def test_refused(check, name, message):
    result = check(name)
    assert result.returncode == 0, result.stderr
    assert message in result.stdout


@pytest.mark.parametrize("name", ["ordered_by_barrier", "ordered_by_warp", "late_copy", "flag_of_all", "block_sum"])
def test_threads_in_order(check_races, name):
    numbers(check_races(name))


@pytest.mark.parametrize("name", ["unordered", "unordered_by_shuffle", "early_copy"])
def test_races_are_found(check_races, name):
    result = check_races(name)
    assert result.returncode != 0
    assert "ThreadSanitizer: data race" in result.stderr


def test_addresses_are_checked_inside_kernels(check):
    result = check("overrun")
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr
