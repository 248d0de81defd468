"""P9: a job with two writers, killed with SIGKILL at random moments, always completes identical."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selection.store.store import StoreReader, is_complete
from tests.faults import run_until_killed, snapshot

N_KILLS = 20
WORKER = Path(__file__).with_name("store_worker.py")


def command(root: Path, milliseconds: int) -> list[str]:
    return [sys.executable, str(WORKER), str(root), str(milliseconds)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("reference")
    subprocess.run(command(root, 0), check=True, capture_output=True)
    (folder,) = root.iterdir()
    assert is_complete(folder) and len(StoreReader.open(folder)) == 300
    return snapshot(folder)


def test_kill_at_random_moments(tmp_path, reference):
    """Whenever a run gets through, it is compared and a new one begins, until 20 were killed."""
    rng, milliseconds = random.Random(0), 10
    begun = time.monotonic()
    subprocess.run(command(tmp_path / "timing", milliseconds), check=True, capture_output=True)
    duration = time.monotonic() - begun
    root, kills, partial, completed = tmp_path / "job", 0, 0, 0
    while kills < N_KILLS or not completed:
        # short enough that a run is killed several times before it gets through
        status = run_until_killed(command(root, milliseconds), rng.uniform(0, duration / 2))
        kills += status == -signal.SIGKILL
        partial += any(root.rglob("block-*")) and not any(root.rglob("manifest.json"))
        if status == 0 or kills >= N_KILLS:
            subprocess.run(command(root, 0), check=True, capture_output=True)
            (folder,) = root.iterdir()
            assert snapshot(folder) == reference
            shutil.rmtree(root)
            completed += 1
    assert partial >= N_KILLS // 4, "the kills came before or after the work: nothing was tested"
