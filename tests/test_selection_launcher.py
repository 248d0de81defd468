"""selection.sh as its users run it: what it chooses, what it refuses, and with which code it ends.

What it names and prepares where nothing is named: tests/mini/test_launch.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIXTURE = ROOT / "mini" / "fixture"
POOL = ["--pool", str(FIXTURE / "pool.json"), "--images", str(FIXTURE / "images")]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The shell part of a clone in which nothing has run yet."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("selection.sh", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def select(clone: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Run the launcher with this interpreter, for which pip installs nothing."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
  "-c import sys; print(sys.prefix)") echo "{tmp_path}" ;;
  "-m pip "*) ;;
  *) exec "{sys.executable}" "$@" ;;
esac
"""
    )
    python.chmod(0o755)

    def select(*flags: str, **environment: str) -> subprocess.CompletedProcess:
        inherited = {k: v for k, v in os.environ.items() if k not in ("NPROC", "TORCHRUN_ARGS")}
        given = {"PYTHON": str(python), "PYTHONPATH": str(ROOT), "NPROC": "1", **environment}
        return subprocess.run(
            ["bash", clone / "selection.sh", *flags],
            env=inherited | given,
            capture_output=True,
            text=True,
        )

    return select


def made(clone: Path) -> list[str]:
    """What a run has left in the clone."""
    return sorted(p.name for p in clone.iterdir() if p.name in ("outputs", "playground"))


def test_a_subset_is_chosen_from_a_pool_that_is_named(select, clone):
    done = select("random", *POOL, "--budget", "10", "--out", "run")
    assert done.returncode == 0, done.stderr
    assert len(json.loads((clone / "run/subset.json").read_text())) == 10
    assert made(clone) == []


@pytest.mark.parametrize("method", ["mllm_selector", "icons", "less", "tive", "coido", "all"])
def test_flags_are_read_before_a_model_is_trained(select, clone, method):
    done = select(method, *POOL, "--budgt", "1")
    assert done.returncode == 2 and made(clone) == []
    assert "--budgt: no such flag (did you mean --budget?)" in done.stderr


@pytest.mark.parametrize("method", ["el2n", "rho_loss", "all"])
def test_flags_are_read_before_the_small_world_is_built(select, clone, method):
    done = select(method, "--budgt", "1")
    assert done.returncode == 2 and made(clone) == []
    assert "--budgt: no such flag (did you mean --budget?)" in done.stderr


def test_a_dry_run_trains_nothing(select, clone):
    done = select("mllm_selector", *POOL, "--dry-run")
    assert done.returncode == 2 and made(clone) == []
    (line,) = done.stderr.splitlines()[1:]  # the first is the setup's
    assert line.startswith("error: --dry_run: mllm_selector would first train a model; name one")


def test_an_unknown_method_prepares_nothing(select, clone):
    done = select("nonsense", "--budget", "0.1")
    assert done.returncode == 2 and made(clone) == []
    assert "method 'nonsense' is unknown" in done.stderr and "mllm_selector" in done.stderr


@pytest.mark.parametrize("flags", [["--help"], ["icons", "-h"], ["random", "--print_config"]])
def test_help_prepares_nothing(select, clone, flags):
    done = select(*flags)
    assert done.returncode == 0 and made(clone) == []
    assert "--budget" in done.stdout or "budget:" in done.stdout


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_exit_code_of_the_selection_is_the_launchers(select, clone, processes):
    (clone / "pool.json").write_text('[{"id": 1')
    done = select("random", "--pool", "pool.json", "--out", "run", NPROC=processes)
    assert done.returncode == 65, done.stderr
