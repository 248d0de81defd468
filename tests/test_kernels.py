"""Bits (promises P5 and P6) under other kernels and numbers of threads than the suite's own.

PyTorch, oneMKL and oneDNN choose their kernels by the processor, once; one processor can play
another with fewer instructions. So the tests marked `bits` run once more for some sets of kernels,
each in a process of its own. oneMKL lets only Intel's processors play.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
KERNELS = {  # by what PyTorch says of the processor, fewer instructions first
    "DEFAULT": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "AVX512": {"ATEN_CPU_CAPABILITY": "avx512", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
}
PROGRAMS = ("selection.__main__", "llava.train.__main__", "llava.eval.__main__", "mini.__main__")


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute of processor time, on machines that do other work too
@pytest.mark.parametrize(("kernels", "n_threads"), [("DEFAULT", 2), ("AVX2", 1), ("AVX512", 2)])
def test_the_tests_of_bits_pass(kernels, n_threads):
    capability = torch.backends.cpu.get_cpu_capability()
    known = list(KERNELS)
    if capability not in known or known.index(capability) < known.index(kernels):
        pytest.skip(f"{kernels} kernels: this processor has {capability}")
    environment = {
        **os.environ,
        **KERNELS[kernels],
        "OMP_NUM_THREADS": str(n_threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # the other cores have tests of their own to run
    }
    files = [
        str(path) for path in ROOT.glob("tests/**/test_*.py") if "mark.bits" in path.read_text()
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "bits", *files]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]


@pytest.mark.bits
@pytest.mark.parametrize("shape", [(8192,), (8192, 300)])
def test_no_bit_of_a_product_depends_on_where_in_memory_its_operands_lie(shape):
    """Without strict reproducibility those of a matrix and a vector do, on an AMD EPYC."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*size, generator=generator) for size in ((128, 8192), shape))
    products = set()
    for offset in (0, 1, 5):  # of the 16 numbers that share a cache line
        moved = [
            torch.empty(x.numel() + offset)[offset:].view_as(x).copy_(x) for x in (left, right)
        ]
        products.add((moved[0] @ moved[1]).numpy().tobytes())
    assert len(products) == 1


@pytest.mark.parametrize("program", [*PROGRAMS, "llava.launch"])
def test_every_program_asks_for_strict_reproducibility_before_torch_is_loaded(program):
    assert _seen_by_torch(program, {}) == "AUTO,STRICT"


def test_what_the_user_asked_of_onemkl_stays():
    assert _seen_by_torch("selection.__main__", {"MKL_CBWR": "COMPATIBLE"}) == "COMPATIBLE"


def _seen_by_torch(program: str, environment: dict[str, str]) -> str:
    """MKL_CBWR as it stands when torch is about to be loaded, by this program or after it."""
    code = f"""
import os, sys

class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            sys.exit(os.environ.get("MKL_CBWR", "not set"))

sys.meta_path.insert(0, Watch)
import {program}
import torch
"""
    others = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, cwd=ROOT, env=others | environment, capture_output=True, text=True
    )
    return run.stderr.strip()
