"""The ops that run: kernels, or the references with a warning, or an error that names the cause."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dalle_fast as df

PACKAGE = Path(df.__file__).parent

USE = """
import torch, dalle_fast as df
mask = df.AttentionMask("row", 1, 2, 2)
x = torch.randn(1, 1, 5, 4, requires_grad=True)
out = df.sparse_attention(x, x, x, mask)
out.sum().backward()
assert torch.allclose(out, df.reference.sparse_attention(x, x, x, mask), atol=1e-6)
df.sparse_attention(x, x, x, mask)
print(df.backend())
"""


def python(code, path=None, **environment):
    """Run code in a fresh interpreter; `path` comes first on the module path."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=path)


@pytest.fixture
def copy(tmp_path):
    """A copy of the Python files, without any binary."""
    for folder in (PACKAGE, PACKAGE / "ops"):
        target = tmp_path / "dalle_fast" / folder.relative_to(PACKAGE)
        target.mkdir(parents=True)
        for file in folder.glob("*.py"):
            shutil.copy(file, target)
    return tmp_path


def test_kernels_run_here():
    backend = df.backend()
    assert "cpu" in backend.devices
    assert backend.reference is None
    assert re.match(r"cpu: yes \((portable|avx2|avx512), built with torch ", str(backend))
    assert "\ncuda: " in str(backend)


def test_forced_portable():
    result = python(USE, DALLE_FAST_SIMD="portable")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("cpu: yes (portable, built with torch ")


def test_wrong_instruction_set():
    result = python("import dalle_fast.ops", DALLE_FAST_SIMD="avx3")
    assert result.returncode == 1
    assert "DALLE_FAST_SIMD: expected portable, avx2 or avx512, got avx3" in result.stderr


def test_forced_reference():
    result = python(USE, DALLE_FAST_REFERENCE="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("reference: forced by DALLE_FAST_REFERENCE\n")
    assert result.stdout.startswith("cpu: no")


def test_missing_binary_warns_once(copy):
    result = python(USE, copy)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("UserWarning: dalle_fast runs its slow reference ops: dalle_fast._C is not built") == 1
    assert "reference: dalle_fast._C is not built; run: pip install" in result.stdout


def test_broken_binary_is_an_error(copy):
    (copy / "dalle_fast" / "_C.abi3.so").write_bytes(b"not a library")
    result = python(USE, copy)
    assert result.returncode == 1
    assert "ImportError: dalle_fast._C is built but does not load with torch" in result.stderr
    assert "Rebuild it: pip install" in result.stderr.splitlines()[-1]


def test_a_device_without_kernels_is_an_error(monkeypatch):
    from dalle_fast.ops import _library

    monkeypatch.setattr(_library, "_BACKEND", _library.Backend(("cpu",), {"cpu": "", "cuda": "no nvcc"}))
    with pytest.raises(RuntimeError, match="adamw16: this install has no kernel for cuda: no nvcc"):
        _library.reference_op("adamw16", torch.device("cuda"))
    with pytest.raises(RuntimeError, match="sample: this install has no kernel for cuda"):
        df.ops.waits_on_host("sample", torch.device("cuda"))
    assert _library.reference_op("adamw16", torch.device("cpu")) is None


def test_a_cuda_kernel_that_never_ran_on_a_gpu_is_off(monkeypatch):
    from dalle_fast.ops import _library

    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    reasons = {"cpu": "avx2", "cuda": "CUDA 13.0"}
    both = {"reasons": reasons, "unverified": frozenset({"sample", "adamw16"})}
    backend = _library.Backend(("cpu", "cuda"), cuda_ops=frozenset({"sparse_attention"}), **both)
    monkeypatch.setattr(_library, "_BACKEND", backend)
    assert _library.reference_op("adamw16", cuda) is df.reference.adamw16
    assert _library.reference_op("packed_linear", cuda) is df.reference.packed_linear  # has no CUDA kernel at all
    assert _library.reference_op("sparse_attention", cuda) is None
    assert df.ops.waits_on_host("sample", cuda) and not df.ops.waits_on_host("sparse_attention", cuda)
    assert _library.reference_op("adamw16", cpu) is None
    lines = str(backend).splitlines()
    assert lines[1] == "cuda: yes (CUDA 13.0)"
    assert lines[2:] == [
        "cuda kernels not yet run on a GPU, off (DALLE_FAST_UNVERIFIED=1 switches them on): adamw16, sample"
    ]
    switched_on = _library.Backend(("cpu", "cuda"), cuda_ops=both["unverified"], **both)
    monkeypatch.setattr(_library, "_BACKEND", switched_on)
    assert _library.reference_op("adamw16", cuda) is None
    assert str(switched_on).splitlines()[2:] == ["cuda kernels not yet run on a GPU, on: adamw16, sample"]


def test_unknown_public_name():
    with pytest.raises(AttributeError, match="module 'dalle_fast' has no attribute 'attention'"):
        _ = df.attention


@pytest.mark.parametrize("name", df.__all__)
def test_public_name(name):
    assert getattr(df, name) is not None
