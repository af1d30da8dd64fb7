"""The report of .ci/cuda_resources.py, from the output of ptxas."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "cuda_resources.py"

REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN10dalle_fast4goodIfEEvPT_' for 'sm_80'
ptxas info    : Function properties for _ZN10dalle_fast4goodIfEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 3328 bytes smem, 480 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN10dalle_fast3badEPi' for 'sm_90a'
ptxas info    : Function properties for _ZN10dalle_fast3badEPi
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("cuda_resources", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("stack", "stores", "loads", "acceptable"),
    [(0, 0, 0, True), (16, 12, 12, True), (64, 64, 64, True), (72, 68, 60, False), (256, 0, 0, False)],
)
def test_usages(script, stack, stores, loads, acceptable):
    good, bad = script.usages(REPORT.format(stack=stack, stores=stores, loads=loads))
    assert good == script.Usage("good<float>", "sm_80", registers=128, stack=0, spilled=0, shared=3328)
    assert bad == script.Usage("bad", "sm_90a", registers=255, stack=stack, spilled=max(stores, loads), shared=0)
    assert good.acceptable
    assert bad.acceptable == acceptable


def test_serialised(script):
    line = "ptxas info    : (C7508) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert script.SERIALISED.findall(f"a\n{line}\nb") == [line]
    assert script.SERIALISED.findall("ptxas info    : Used 75 registers") == []
