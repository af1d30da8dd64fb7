"""Compiles every CUDA kernel for each architecture and prints its registers, shared memory and spills.

Fails on many spills, arrays on the stack, warnings that wgmma was serialised, or a long compile time; needs no GPU.
Usage: ``python .ci/cuda_resources.py [FILE.cu ...]``.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ARCHITECTURES = ("sm_80", "sm_90a")
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DDALLE_FAST_CUDA", "-Xptxas", "-v"]
MOST_SPILLED = 64  # bytes
CORES = 2
MOST_SECONDS = 240  # for all kernels on that many cores

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
SERIALISED = re.compile(r".*\bC75(?:08|12)\b.*")


@dataclass(frozen=True)
class Usage:
    """Resources of one kernel; stack, spills and static shared memory in bytes."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    shared: int

    @property
    def acceptable(self) -> bool:
        spill_slots = (self.spilled + 7) // 8 * 8
        return self.spilled <= MOST_SPILLED and self.stack <= spill_slots


def readable(mangled: str) -> str:
    """Name and template arguments of a kernel, without namespaces and parameters."""
    name = subprocess.run(["c++filt", "-p", mangled], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"(?:\(anonymous namespace\)|[a-z]\w*)::|^void ", "", name)


def usages(report: str) -> Iterator[Usage]:
    """The kernels in the output of ``ptxas -v``."""
    for part in re.split(r"(?=ptxas info\s+: Compiling entry function)", report)[1:]:
        if found := KERNEL.search(part):
            stack, stores, loads = (int(found[name]) for name in ("stack", "stores", "loads"))
            name, architecture = readable(found["name"]), found["architecture"]
            shared = int(found["shared"] or 0)
            yield Usage(name, architecture, int(found["registers"]), stack, max(stores, loads), shared)


def compile_for(job: tuple[Path, str]) -> str:
    file, architecture = job
    command = ["nvcc", *FLAGS, f"-I{ROOT / 'csrc'}", f"-arch={architecture}", "-c", str(file), "-o", "/dev/null"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{file.name} does not compile for {architecture}:\n{result.stderr}")
    return result.stdout + result.stderr


def main(files: list[Path]) -> int:
    with ThreadPoolExecutor(CORES) as pool:
        reports = list(pool.map(compile_for, [(file, name) for file in files for name in ARCHITECTURES]))
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)  # CPU time: other processes may share the cores
    seconds = (spent.ru_utime + spent.ru_stime) / CORES
    found = [usage for report in reports for usage in usages(report)]
    faults = [line for report in reports for line in SERIALISED.findall(report)]
    for usage in found:
        spilled = f", {usage.spilled} B spilled" if usage.spilled else ""
        stack = f", {usage.stack} B stack" if usage.stack else ""
        shared = f", {usage.shared} B shared" if usage.shared else ""
        line = f"{usage.architecture:7} {usage.registers:3} registers{shared}{spilled}{stack}  {usage.kernel}"
        print(line)
        if not usage.acceptable:
            faults.append(line)
    if seconds > MOST_SECONDS:
        faults.append(f"{seconds:.0f} s to compile on {CORES} cores, expected at most {MOST_SECONDS}")
    print(f"{len(found)} kernels of {len(files)} files in {seconds:.0f} s on {CORES} cores")
    for fault in faults:
        print(f"not acceptable: {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    chosen = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "csrc").glob("*/*.cu"))
    raise SystemExit(main(chosen))
