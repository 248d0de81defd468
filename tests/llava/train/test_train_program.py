"""`python -m llava.train` as a program: alone, and under torchrun with two processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llava.model.checkpoint import load

ROOT = Path(__file__).parents[3]


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


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout that is not installed; its package says that it is the one in use."""
    package = tmp_path / "clone" / "llava"
    shutil.copytree(ROOT / "llava", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").write_text("import sys\nprint('the clone', file=sys.stderr)\n")
    return package.parent


@pytest.mark.parametrize("name", ["train", "train_mem", "train_xformers"])
def test_entry_points_run_as_files(run, squares, clone, monkeypatch, name):
    """From the checkout's root, as LLaVA's scripts call them, and from elsewhere."""
    changes = {"vision_tower": None, "image_folder": None, "max_steps": 1}
    flags = run.flags("out", data_path=squares / "text.json", **changes)
    elsewhere = name == "train_mem"
    monkeypatch.chdir(squares if elsewhere else clone)
    file = f"{clone if elsewhere else '.'}/llava/train/{name}.py"
    done = launch([sys.executable, file], flags)
    assert done.returncode == 0, done.stderr
    assert "the clone" in done.stderr and "1 steps in" in done.stderr
    if name == "train_mem" and not torch.cuda.is_available():
        (line,) = [line for line in done.stderr.splitlines() if "flash attention" in line]
        assert line.endswith("PyTorch's own is used")


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
    common |= {"logging_steps": 1, "eval_data_path": path, "eval_on_start": True}
    run("one", per_device_train_batch_size=4, **common)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc_per_node", "2", "-m", "llava.train"]
    done = launch(command, run.flags("two", per_device_train_batch_size=2, **common))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("held-out loss") == 2 and done.stderr.count("samples, 4 steps") == 1
    ours, theirs = (load(tmp_path / name).model.state_dict() for name in ("one", "two"))
    logs = [json.loads((tmp_path / n / "trainer_state.json").read_text()) for n in ("one", "two")]
    for key in ("loss", "grad_norm"):  # Adam would hide a gradient of the wrong scale
        mine, other = ([line[key] for line in log["log_history"] if key in line] for log in logs)
        assert len(mine) == 4 and mine == pytest.approx(other, rel=1e-3), key
    # Of the same weights, before the first step: the same but for the order of the sum.
    first, second = (log["log_history"][0] for log in logs)
    assert first["eval_loss"] == pytest.approx(second["eval_loss"], rel=1e-5)
    assert first["eval_tokens"] == second["eval_tokens"] > 0
    for name in ours:
        # Gradients are summed in another order; Adam's first steps of 1e-2 amplify rounding.
        assert torch.allclose(ours[name], theirs[name], atol=2e-3), name
