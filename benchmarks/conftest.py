"""The `race` fixture: a kernel against its peers in one process, round by round, and the table of all races.

Times are the best of all rounds. Ratios are what counts; milliseconds say something about this machine alone.
"""

from __future__ import annotations

import ctypes
import json
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_fast.training.memory import keep_freed_memory

RESULTS: list[dict[str, Any]] = []


def pytest_addoption(parser):
    parser.addoption(
        "--results",
        type=Path,
        help="folder of a JSON file for each machine; takes the place of its earlier results of the same cases",
    )


@pytest.fixture
def race(benchmark, ceilings):  # the ceilings are for the table
    """Assert the result of `ours`, then time it and its peers in turn.

    ours, peers: functions without arguments. expected: what ours returns, or a function that computes it.
    flops, bytes: work of one call, for GFLOP/s and GB/s. targets: ratios to peers that we want to reach.
    iterations: calls in a round, for work of microseconds. warm: whether one unmeasured round comes first.
    expected None: the test has asserted the result in its own way.
    """

    def run(
        name: str,
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any]],
        expected: Any,
        flops: float | None = None,
        bytes: float | None = None,
        targets: dict[str, float] | None = None,
        rounds: int = 10,
        iterations: int = 1,
        rtol: float = 1e-4,
        atol: float = 1e-5,
        warm: bool = True,
    ) -> None:
        if expected is not None:
            exact = expected() if callable(expected) else expected
            torch.testing.assert_close(ours(), exact, rtol=rtol, atol=atol, check_dtype=False)
            del exact
        times: dict[str, float] = {}

        def time_peers():
            for peer, call in peers.items():
                start = time.perf_counter()
                for _ in range(iterations):
                    call()
                elapsed = (time.perf_counter() - start) / iterations
                times[peer] = min(elapsed, times.get(peer, elapsed))

        def repeat():
            for _ in range(iterations):
                ours()

        if warm:
            time_peers()
            times.clear()  # the first call compiles and allocates
        benchmark.group = name
        benchmark.pedantic(repeat, setup=time_peers, rounds=rounds)
        seconds = benchmark.stats.stats.min / iterations
        row: dict[str, Any] = {"case": name, "ms": seconds * 1e3, "peers": {}}
        for unit, work in (("GFLOP/s", flops), ("GB/s", bytes)):
            if work is not None:
                row[unit] = work / seconds / 1e9
        for peer, peer_seconds in times.items():
            row["peers"][peer] = {
                "ms": peer_seconds * 1e3,
                "ratio": peer_seconds / seconds,
                "target": (targets or {}).get(peer),
            }
        benchmark.extra_info.update(row)
        RESULTS.append(row)

    return run


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


@pytest.fixture(params=["fresh", "reused"])
def memory(request):
    """Runs a case twice. "reused": freed memory is kept for the next call, as training does. "fresh": large tensors are
    mapped anew, and touching their pages is part of the time."""
    if request.param == "reused":
        keep_freed_memory()
    yield request.param
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 128 * 1024)
    libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
    libc.malloc_trim(0)


@pytest.fixture(scope="session")
def ceilings(tmp_path_factory) -> tuple[float, float]:
    """GFLOP/s and GB/s of this machine with as many threads as torch uses."""
    binary = tmp_path_factory.mktemp("ceilings") / "ceilings"
    source = Path(__file__).with_name("ceilings.cpp")
    subprocess.run(["g++", "-O3", "-march=native", "-fopenmp", source, "-o", binary], check=True)
    command = [binary, str(torch.get_num_threads())]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(5)]
    gflops, gbytes = (max(map(float, column)) for column in zip(*runs, strict=True))
    MACHINE.update({"GFLOP/s": gflops, "GB/s": gbytes})
    return gflops, gbytes


def processor() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return match[1] if match else platform.processor() or platform.machine()


MACHINE: dict[str, Any] = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def table() -> list[str]:
    """One line a peer."""
    lines = [f"{'case':<44} {'ours ms':>9} {'rate':>20} {'peer':<28} {'peer ms':>9} {'ratio':>7} {'target':>7}"]
    for row in RESULTS:
        unit = next((unit for unit in ("GFLOP/s", "GB/s") if unit in row), None)
        rate = f"{row[unit]:.1f} {unit} {row[unit] / MACHINE[unit]:.0%}" if unit else ""
        head = f"{row['case']:<44} {row['ms']:>9.3f} {rate:>20}"
        for peer, result in row["peers"].items() or [("", None)]:
            tail = ""
            if result:
                target = "" if result["target"] is None else f"{result['target']:g}x"
                missed = result["target"] is not None and result["ratio"] < result["target"]
                tail = f" {peer:<28} {result['ms']:>9.3f} {result['ratio']:>6.2f}x {target:>7}{' missed' * missed}"
            lines.append((head + tail).rstrip())
            head = " " * len(head)
    return lines


def pytest_terminal_summary(terminalreporter, config):
    if not RESULTS:
        return
    terminalreporter.section("races")
    about = f"{MACHINE['processor']}, {MACHINE['threads']} threads, torch {MACHINE['torch']}"
    terminalreporter.write_line(f"{about}; at most {MACHINE['GFLOP/s']} GFLOP/s and {MACHINE['GB/s']} GB/s")
    for line in table():
        terminalreporter.write_line(line)
    if folder := config.getoption("--results"):
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", f"{MACHINE['processor']} {MACHINE['threads']} threads".lower()).strip("-")
        path = folder / f"{name}.json"
        earlier = json.loads(path.read_text())["races"] if path.exists() else []
        ran = {row["case"] for row in RESULTS}
        races = [row for row in earlier if row["case"] not in ran] + RESULTS
        path.write_text(json.dumps({"machine": MACHINE, "races": races}, indent=1) + "\n")
        terminalreporter.write_line(f"written: {path}")
