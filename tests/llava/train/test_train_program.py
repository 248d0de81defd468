"""`python -m llava.train` as a program: alone, and under torchrun with two processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from llava.model.checkpoint import load


def launch(command: list[str], flags: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*command, *flags], env=environment, capture_output=True, text=True, timeout=200
    )


def test_program_prints_a_line_each_logging_steps(run):
    flags = run.flags("program", logging_steps=3, disable_tqdm=None)
    done = launch([sys.executable, "-m", "llava.train"], flags)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert [re.match(r"step \d/6  loss \d+\.\d{4}  lr ", line) is not None for line in lines] == [
        True,
        True,
    ]
    assert "it/s" not in done.stderr and "Traceback" not in done.stderr


def test_two_processes_with_different_modalities(run, squares, tmp_path):
    """P19: one rank sees only text, the other only images; no rank waits for ever, and both
    together make the step that one process makes of all rows."""
    records = json.loads((squares / "mixed.json").read_text())
    text = [r for r in records if "image" not in r]
    images = [r for r in records if "image" in r]
    path = tmp_path / "alternating.json"
    pairs = [r for n in range(4) for r in (*text[2 * n : 2 * n + 2], *images[2 * n : 2 * n + 2])]
    path.write_text(json.dumps(pairs))
    common = {"data_path": path, "max_steps": 4, "train_sampling_strategy": "sequential"}
    common["logging_steps"] = 1
    run("one", per_device_train_batch_size=4, **common)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node", "2", "-m", "llava.train"]
    done = launch(command, run.flags("two", per_device_train_batch_size=2, **common))
    assert done.returncode == 0, done.stderr
    ours, theirs = (load(tmp_path / name).model.state_dict() for name in ("one", "two"))
    logs = [json.loads((tmp_path / n / "trainer_state.json").read_text()) for n in ("one", "two")]
    for key in ("loss", "grad_norm"):  # Adam would hide a gradient of the wrong scale
        mine, other = ([line[key] for line in log["log_history"] if key in line] for log in logs)
        assert len(mine) == 4 and mine == pytest.approx(other, rel=1e-3), key
    for name in ours:
        # Gradients are summed in another order; Adam's first steps of 1e-2 amplify rounding.
        assert torch.allclose(ours[name], theirs[name], atol=2e-3), name
