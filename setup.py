"""Builds ``dalle_fast._C`` (the torch ops, on torch's stable ABI) and ``dalle_fast._host`` (the data path, pybind11).

Metadata is in pyproject.toml. ``DALLE_FAST_CUDA=0`` leaves the CUDA kernels out, ``DALLE_FAST_CUDA=1`` insists on them;
without it they are built when torch has CUDA and nvcc is found. For tests, ``DALLE_FAST_CUDA_ON_CPU=1`` compiles them
as C++, to run on the CPU in place of its own kernels, and ``DALLE_FAST_SANITIZE=address`` or ``thread`` adds checks of
every address, or of what threads do to the same memory.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sysconfig
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # one binary for every torch from 2.10 on
# Unwind and debug tables stay out; no -march, since the kernels choose their instruction set at run time. Without the
# two -fno flags, selects and square roots are not vectorised.
MATH_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS = ["-O3", "-g0", *MATH_FLAGS, "-fopenmp", "-fvisibility=hidden", "-Wall", STABLE_ABI]
LINK_FLAGS = ["-fopenmp"]
SANITIZE = os.environ.get("DALLE_FAST_SANITIZE", "")
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
# One binary for 8.x and one for Hopper, whose own instructions need the "a"; newer chips compile the PTX.
ARCHITECTURES = ["arch=compute_80,code=[sm_80,compute_80]", "arch=compute_90a,code=sm_90a"]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-DDALLE_FAST_CUDA"]
NVCC_FLAGS += [f"-gencode={architecture}" for architecture in ARCHITECTURES]
CUDA_ON_CPU = os.environ.get("DALLE_FAST_CUDA_ON_CPU") == "1"
CUDA_ON_CPU_FLAGS = ["-O1", "-DDALLE_FAST_CUDA", "-DUSE_CUDA", "-Wno-unknown-pragmas"]

if SANITIZE not in SANITIZERS:
    raise SystemExit(f"DALLE_FAST_SANITIZE: expected address or thread, got {SANITIZE!r}")
if SANITIZE == "address":
    CUDA_ON_CPU_FLAGS += ["-fsanitize-sections=cuda_on_cpu_shared"]  # the kernels' shared memory
if SANITIZE:
    CXX_FLAGS += [*SANITIZERS[SANITIZE], "-fno-omit-frame-pointer", "-g1", "-O1"]  # -O3 would take ten minutes
    LINK_FLAGS += SANITIZERS[SANITIZE]


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def cuda_decision() -> tuple[bool, str]:
    """Whether the CUDA kernels are built, and why (not)."""
    wish = os.environ.get("DALLE_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"DALLE_FAST_CUDA: expected 0 or 1, got {wish!r}")
    if CUDA_ON_CPU:
        return False, "the CUDA kernels run on the CPU, for tests"
    if wish == "0":
        return False, "switched off by DALLE_FAST_CUDA=0"
    if not sources("csrc/*/*.cu"):
        missing = "this version has no CUDA kernels"
    elif torch.version.cuda is None:
        missing = f"torch {torch.__version__} was built without CUDA"
    elif CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        missing = "nvcc was not found; set CUDA_HOME"
    else:
        return True, f"CUDA {torch.version.cuda}"
    if wish == "1":
        raise SystemExit(f"DALLE_FAST_CUDA=1, but the CUDA kernels cannot be built: {missing}")
    return False, missing


def check_toolchain() -> None:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 10):
        raise SystemExit(f"torch: expected 2.10 or newer, got {torch.__version__}")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        raise SystemExit(f"{header} is missing: install Python's headers (Debian, Ubuntu: apt-get install python3-dev)")
    compiler = (shlex.split(os.environ.get("CXX", "")) or ["c++"])[0]
    if shutil.which(compiler) is None:
        raise SystemExit(f"{compiler} is missing: install a C++ compiler (Debian, Ubuntu: apt-get install g++)")


def cuda_as_cpp() -> list[str]:
    """A C++ file for each .cu, since the name decides which compiler takes it."""
    folder = ROOT / "build" / "cuda_on_cpu" / "sources"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for kernel in sources("csrc/*/*.cu"):
        file = folder / f"{Path(kernel).stem}.cpp"
        text = f'#include "{ROOT / kernel}"\n'
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        files.append(str(file.relative_to(ROOT)))
    return files


def torch_ops(with_cuda: bool) -> Extension:
    """``_C``: schemas, checks, and the kernels of each backend."""
    files = [file for file in sources("csrc/*.cpp", "csrc/*/*.cpp") if not file.startswith("csrc/host/")]
    options = {"include_dirs": [str(ROOT / "csrc")], "py_limited_api": True, "extra_link_args": LINK_FLAGS}
    if CUDA_ON_CPU:
        options["include_dirs"].insert(0, str(ROOT / "tests" / "cuda_on_cpu"))  # its headers come before csrc's
        files += [*cuda_as_cpp(), "tests/cuda_on_cpu/cuda_on_cpu.cpp"]
        return CppExtension(
            "dalle_fast._C", files, extra_compile_args={"cxx": [*CXX_FLAGS, *CUDA_ON_CPU_FLAGS]}, **options
        )
    if not with_cuda:
        return CppExtension("dalle_fast._C", files, extra_compile_args={"cxx": CXX_FLAGS}, **options)
    return CUDAExtension(
        "dalle_fast._C",
        files + sources("csrc/*/*.cu"),
        extra_compile_args={"cxx": [*CXX_FLAGS, "-DDALLE_FAST_CUDA", "-DUSE_CUDA"], "nvcc": NVCC_FLAGS},
        **options,
    )


def host_module() -> list[Extension]:
    """``_host``: numpy in, numpy out; not abi3, because pybind11 is not."""
    files = sources("csrc/host/*.cpp")
    flags = {"cxx": ["-O3", "-g0", "-fvisibility=hidden", "-Wall"]}
    include = [pybind11.get_include(), str(ROOT / "csrc")]
    return [Extension("dalle_fast._host", files, include_dirs=include, extra_compile_args=flags)] if files else []


class Build(BuildExtension):
    """Compiles, then records what was built and why in ``dalle_fast/_build_info.py``."""

    def run(self) -> None:
        check_toolchain()
        super().run()
        target = Path(self.get_ext_fullpath("dalle_fast._C")).parent / "_build_info.py"
        target.write_text(
            '"""Written by setup.py."""\n\n'
            f"TORCH_VERSION = {torch.__version__!r}\n"
            f"CUDA = {WITH_CUDA!r}\nCUDA_ON_CPU = {CUDA_ON_CPU!r}\nCUDA_REASON = {CUDA_REASON!r}\n"
        )


WITH_CUDA, CUDA_REASON = cuda_decision()
setup(ext_modules=[torch_ops(WITH_CUDA), *host_module()], cmdclass={"build_ext": Build})
