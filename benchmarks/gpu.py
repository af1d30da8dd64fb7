"""Everything that only a GPU can check, in at most nine minutes on 16 cores: build, tests, sanitizers, races.

Run: make gpu. It needs no network: the installed torch (2.10 or newer), pytest, nvcc and compute-sanitizer are used.
A step that fails does not keep the others from running. The results of all go to benchmarks/results/<GPU>.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PYTEST = [sys.executable, "-m", "pytest", "-q"]
OP_TESTS = [f"tests/test_{op}.py" for op in ("attention", "decode", "sample", "gumbel", "rng", "resblock", "adamw16")]
SANITIZER = ["compute-sanitizer", "--error-exitcode", "1", "--target-processes", "all", "--tool"]
# Name, most seconds, command.
STEPS: list[tuple[str, int, list[str]]] = [
    ("build", 150, [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]),
    ("tests", 120, [*PYTEST, "-n", "8"]),
    ("memcheck", 60, [*SANITIZER, "memcheck", *PYTEST, "-n", "0", "-k", "cuda", "-m", "not large", *OP_TESTS]),
    ("racecheck", 60, [*SANITIZER, "racecheck", *PYTEST, "-n", "0", "-k", "cuda", "-m", "not large", *OP_TESTS]),
    ("races", 240, [*PYTEST, "--benchmark-quiet", "--device", "cuda", "--results", str(RESULTS), "benchmarks"]),
]


def main() -> int:
    environment = {**os.environ, "DALLE_FAST_CUDA": "1", "DALLE_FAST_UNVERIFIED": "1", "PYTHONPATH": str(ROOT)}
    if extra := os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] += os.pathsep + extra
    checks = {}
    started = time.time()
    for name, limit, command in STEPS:
        print(f"== {name}", flush=True)
        start, lines = time.monotonic(), []
        with subprocess.Popen(
            ["timeout", str(limit), *command], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            for line in process.stdout or ():
                print(line, end="", flush=True)
                lines.append(line.strip())
        seconds = round(time.monotonic() - start)
        passed = process.returncode == 0
        checks[name] = {"passed": passed, "seconds": seconds, "last line": lines[-1] if lines else ""}
        print(f"== {name}: {'passed' if passed else 'FAILED'} in {seconds} s", flush=True)
    written = [path for path in RESULTS.glob("*.json") if path.stat().st_mtime >= started]
    for path in written:
        path.write_text(json.dumps({"checks": checks, **json.loads(path.read_text())}, indent=1) + "\n")
    return 0 if written and all(check["passed"] for check in checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
