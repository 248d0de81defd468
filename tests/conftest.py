"""Fixtures every test may use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import llava  # noqa: F401  before torch: it says how oneMKL is to round

# isort: split
import torch

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # tests run in parallel, one worker a core


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """`torch.set_num_threads`, undone when the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Optional folder beside the clone: golden conversations, ScienceQA items, a vocabulary."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"optional test data is not present: {folder}")
    return folder
