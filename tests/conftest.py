"""Fixtures every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tests run in parallel, one worker a core


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Optional folder beside the clone: golden conversations, ScienceQA items, a vocabulary."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"optional test data is not present: {folder}")
    return folder
