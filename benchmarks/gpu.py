"""Everything that only a GPU can check, in at most nine minutes on 16 cores: build, tests, sanitizers, races.

Run: make gpu. It needs no network: the installed torch (2.10 or newer), pytest, nvcc and compute-sanitizer are used.
A step that fails does not keep the others from running. The results of all go to benchmarks/results/<GPU>.json; every
race is written there when it is over, and each module of races has a process of its own, in case a kernel kills it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PYTEST = [sys.executable, "-m", "pytest", "-q"]
# The slowest come last.
OPS = (
    "philox_uniform",
    "resblock_scales",
    "adamw16",
    "sample",
    "resblock",
    "gumbel",
    "decode_attention",
    "sparse_attention",
)
OP_TESTS = ["-n", "0", "-k", "cuda and not graph", "-m", "not large", *(f"tests/test_{op}.py" for op in OPS)]
SANITIZER = ["compute-sanitizer", "--error-exitcode", "1", "--kernel-name", "kns=dalle_fast", "--tool"]
RACES = [*PYTEST, "--benchmark-quiet", "--device", "cuda", "--results", str(RESULTS)]
RACED = ("sparse_attention", "decode_attention", "gumbel", "resblock", "adamw16", "sample", "end_to_end")
# Name, most seconds, and commands that share them.
STEPS: list[tuple[str, int, list[list[str]]]] = [
    ("build", 105, [[sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]]),
    ("tests", 90, [[*PYTEST, "-n", "12"]]),
    ("memcheck", 45, [[*SANITIZER, "memcheck", *PYTEST, *OP_TESTS]]),
    ("racecheck", 45, [[*SANITIZER, "racecheck", *PYTEST, *OP_TESTS]]),
    ("races", 250, [[*RACES, f"benchmarks/bench_{name}.py"] for name in RACED]),
]
# Else torch's allocator lends parts of its own large blocks, and what is beyond a tensor is often no error.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def main() -> int:
    environment = {**os.environ, "DALLE_FAST_CUDA": "1", "DALLE_FAST_UNVERIFIED": "1", "PYTHONPATH": str(ROOT)}
    if extra := os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] += os.pathsep + extra
    checks: dict[str, dict[str, Any]] = {}
    started = time.time()
    for name, limit, commands in STEPS:
        print(f"== {name}", flush=True)
        start, lines, passed = time.monotonic(), [""], True
        for command in commands:
            left = limit - (time.monotonic() - start)
            if left < 1:
                passed = False
                break
            extra = UNCACHED if command[0] == SANITIZER[0] else {}
            # Interrupted, pytest still says what it has seen so far.
            with subprocess.Popen(
                ["timeout", "--signal", "INT", "--kill-after", "3", f"{left:.0f}", *command],
                cwd=ROOT, env=environment | extra, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            ) as process:  # fmt: skip
                for line in process.stdout or ():
                    print(line, end="", flush=True)
                    lines.append(line.strip())
            passed &= process.returncode == 0
        seconds = round(time.monotonic() - start)
        checks[name] = {"passed": passed, "seconds": seconds, "last line": lines[-1]}
        print(f"== {name}: {'passed' if passed else 'FAILED'} in {seconds} s", flush=True)
    written = [path for path in RESULTS.glob("*.json") if path.stat().st_mtime >= started]
    for path in written or [RESULTS / "gpu.json"]:  # of no race, where none came to an end
        results = json.loads(path.read_text()) if written else {}
        path.write_text(json.dumps({**results, "checks": checks}, indent=1) + "\n")
    return 0 if all(check["passed"] for check in checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
