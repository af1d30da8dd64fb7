"""The `race` fixture: a kernel against its peers in one process, round by round, and the table of all races.

Times are the best of all rounds. Only ratios can be compared between machines, milliseconds cannot. Cases whose name
begins with test_cuda run with `--device cuda`, the others without it.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dalle_fast.training.loop import keep_freed_memory

RESULTS: list[dict[str, Any]] = []
CEILINGS = ("GFLOP/s", "GB/s")  # units whose best value on this machine is measured


def pytest_addoption(parser):
    parser.addoption(
        "--results",
        type=Path,
        help="folder with a JSON file per machine; new results replace earlier ones of the same cases",
    )
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where the kernels race")


def on_gpu(config) -> bool:
    return config.getoption("--device") == "cuda"


def pytest_collection_modifyitems(config, items):
    chosen = [item for item in items if item.name.startswith("test_cuda") == on_gpu(config)]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def repeated(call: Callable[[], Any], iterations: int) -> Callable[[], None]:
    """A function that makes that many calls."""

    def repeat():
        for _ in range(iterations):
            call()

    return repeat


def captured(call: Callable[[], Any], iterations: int) -> Callable[[], None]:
    """The same for a GPU, replayed from one graph: kernels are timed, not the Python that launches them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        repeated(call, 3)()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        repeated(call, iterations)()
    return graph.replay


@pytest.fixture
def race(request, benchmark, ceilings):  # the ceilings are for the table
    """Assert the result of `ours`, then time it and its peers in turn.

    ours, peers: functions without arguments. expected: what ours returns, or a function that computes it.
    flops, bytes, samples: work of one call, for GFLOP/s, GB/s, samples/s. targets: ratios to peers to reach.
    iterations: calls in a round, for work of microseconds. warm: run one unmeasured round first.
    expected None: the test has asserted the result in its own way. capture: replay a CUDA graph of the calls on a GPU.
    """
    gpu = on_gpu(request.config)

    def run(
        name: str,
        ours: Callable[[], Any],
        peers: dict[str, Callable[[], Any]],
        expected: Any,
        flops: float | None = None,
        bytes: float | None = None,
        samples: int | None = None,
        targets: dict[str, float] | None = None,
        rounds: int = 10,
        iterations: int = 1,
        rtol: float = 1e-4,
        atol: float = 1e-5,
        warm: bool = True,
        capture: bool = True,
    ) -> None:
        if expected is not None:
            exact = expected() if callable(expected) else expected
            torch.testing.assert_close(ours(), exact, rtol=rtol, atol=atol, check_dtype=False)
            del exact
        times: dict[str, float] = {}
        prepare = captured if gpu and capture else repeated
        rivals = {peer: prepare(call, iterations) for peer, call in peers.items()}
        repeat = prepare(ours, iterations)

        def finish(calls):
            calls()
            if gpu:
                torch.cuda.synchronize()

        def time_peers():
            for peer, calls in rivals.items():
                start = time.perf_counter()
                finish(calls)
                elapsed = (time.perf_counter() - start) / iterations
                times[peer] = min(elapsed, times.get(peer, elapsed))

        if warm:
            time_peers()
            times.clear()  # the first call compiles and allocates
        benchmark.group = name
        benchmark.pedantic(finish, args=(repeat,), setup=time_peers, rounds=rounds)
        seconds = benchmark.stats.stats.min / iterations
        row: dict[str, Any] = {"case": name, "ms": seconds * 1e3, "peers": {}}
        for unit, work in (("GFLOP/s", flops), ("GB/s", bytes)):
            if work is not None:
                row[unit] = work / seconds / 1e9
        if samples is not None:
            row["samples/s"] = samples / seconds
        for peer, peer_seconds in times.items():
            row["peers"][peer] = {
                "ms": peer_seconds * 1e3,
                "ratio": peer_seconds / seconds,
                "target": (targets or {}).get(peer),
            }
        benchmark.extra_info.update(row)
        RESULTS.append(row)

    return run


@pytest.fixture
def record(ceilings):
    """Add a test's own measurement to the table: seconds, and any numbers by their units."""

    def add(name: str, seconds: float, **numbers: float) -> None:
        RESULTS.append({"case": name, "ms": seconds * 1e3, **numbers, "peers": {}})

    return add


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


@pytest.fixture
def kept_memory():
    """Freed memory is kept for the next call, as in training."""
    keep_freed_memory()
    yield
    give_back_memory()


@pytest.fixture(params=["fresh", "reused"])
def memory(request):
    """Runs a case twice. "reused": freed memory is kept for the next call, as in training. "fresh": large tensors are
    mapped anew, and touching their pages is part of the time."""
    if request.param == "reused":
        keep_freed_memory()
    yield request.param
    give_back_memory()


def give_back_memory() -> None:
    """Undo ``keep_freed_memory``."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 128 * 1024)
    libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
    libc.malloc_trim(0)


@pytest.fixture(scope="session")
def ceilings(request, tmp_path_factory) -> None:
    """Measures GFLOP/s and GB/s of this machine for the table, on as many threads as torch uses, or on its GPU."""
    if on_gpu(request.config):
        MACHINE.update(gpu_machine())
        return
    binary = tmp_path_factory.mktemp("ceilings") / "ceilings"
    source = Path(__file__).with_name("ceilings.cpp")
    subprocess.run(["g++", "-O3", "-march=native", "-fopenmp", source, "-o", binary], check=True)
    command = [binary, str(torch.get_num_threads())]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(5)]
    gflops, gbytes = (max(map(float, column)) for column in zip(*runs, strict=True))
    MACHINE.update({"GFLOP/s": gflops, "GB/s": gbytes})


def gpu_machine() -> dict[str, Any]:
    """The GPU's name, driver, and ceilings: a bfloat16 matrix product, and a copy (read and write together)."""

    def seconds(call, iterations=10):
        times = []
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            repeated(call, iterations)()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / iterations)
        return min(times)

    edge, count = 8192, 2**32
    a, b = (torch.randn(edge, edge, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(count, device="cuda", dtype=torch.uint8) for _ in range(2))
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "processor": torch.cuda.get_device_name(),
        "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0],
        "cuda": torch.version.cuda,
        "GFLOP/s": round(2 * edge**3 / seconds(lambda: a @ b) / 1e9, 1),
        "GB/s": round(2 * count / seconds(lambda: target.copy_(source)) / 1e9, 1),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return match[1] if match else platform.processor() or platform.machine()


def commit() -> str:
    """The commit that is measured, or "unknown" outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


MACHINE: dict[str, Any] = {
    "processor": processor(),
    "threads": torch.get_num_threads(),
    "torch": torch.__version__,
    "date": datetime.date.today().isoformat(),
    "commit": commit(),
}


def table() -> list[str]:
    """One line per peer."""
    lines = [f"{'case':<44} {'ours ms':>9} {'rate':>20} {'peer':<28} {'peer ms':>9} {'ratio':>7} {'target':>7}"]
    for row in RESULTS:
        rates = [f"{row[unit]:,.{digits}f} {unit}" for unit, digits in (("samples/s", 0), ("MB", 1)) if unit in row]
        rates += [f"{row[unit]:.1f} {unit} {row[unit] / MACHINE[unit]:.0%}" for unit in CEILINGS if unit in row]
        rate = rates[0] if rates else ""
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
    where = f"driver {MACHINE['driver']}" if on_gpu(config) else f"{MACHINE['threads']} threads"
    about = f"{MACHINE['processor']}, {where}, torch {MACHINE['torch']}, commit {MACHINE['commit']}"
    terminalreporter.write_line(f"{about}; at most {MACHINE['GFLOP/s']} GFLOP/s and {MACHINE['GB/s']} GB/s")
    for line in table():
        terminalreporter.write_line(line)
    if config.getoption("--results"):
        terminalreporter.write_line(f"written: {write_results(config)}")


def write_results(config) -> Path:
    """Put the races so far into the JSON file of this machine."""
    folder = config.getoption("--results")
    folder.mkdir(parents=True, exist_ok=True)
    title = MACHINE["processor"] if on_gpu(config) else f"{MACHINE['processor']} {MACHINE['threads']} threads"
    path = folder / f"{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}.json"
    earlier = json.loads(path.read_text())["races"] if path.exists() else []
    ran = {row["case"] for row in RESULTS}
    races = [row for row in earlier if row["case"] not in ran] + RESULTS
    path.write_text(json.dumps({"machine": MACHINE, "races": races}, indent=1) + "\n")
    return path


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    """Save what is done, should a later case end the process, and give the next one the whole memory of the GPU."""
    if RESULTS and item.config.getoption("--results"):
        write_results(item.config)
    if on_gpu(item.config):
        sys.last_value = sys.last_traceback = sys.last_exc = None  # of a failed case, with its tensors
        torch.compiler.reset()  # else the ninth graph of a function is not compiled any more
        gc.collect()
        torch.cuda.empty_cache()
