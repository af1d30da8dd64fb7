"""Fixtures of all tests. Every run draws the same examples, and the CUDA kernels are tested wherever they can run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest
from hypothesis import settings

os.environ.setdefault("DALLE_FAST_UNVERIFIED", "1")  # kernels, not their references, on CUDA tensors

import torch

import dalle_fast as df

try:
    from dalle_fast._build_info import CUDA_ON_CPU
except ImportError:  # not built: the references are tested
    CUDA_ON_CPU = False

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() and "cuda" in df.backend().devices else ["cpu"]


@pytest.fixture(params=DEVICES, scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that has kernels here. In the emulation of tests/cuda_on_cpu the CPU runs the CUDA kernels."""
    return torch.device(request.param)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that a second thread only slows them down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cli() -> ModuleType:
    """The commands; their tests are skipped where tyro is missing."""
    return pytest.importorskip("dalle_fast.cli")


def pytest_report_header() -> list[str]:
    return [f"dalle_fast: {df.__path__[0]}", *str(df.backend()).splitlines()]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: takes too long in the emulation of tests/cuda_on_cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CUDA_ON_CPU:
        too_large = pytest.mark.skip(reason="takes too long in the emulation of CUDA on a CPU")
        for item in items:
            if item.get_closest_marker("large"):
                item.add_marker(too_large)
