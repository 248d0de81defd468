"""The command line of `python -m mini`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llava.errors import UsageError
from mini.build import parse
from mini.settings import PoolSettings


def test_flags_with_hyphens_or_underscores():
    where, settings = parse(["--out", "x", "--yes-bias", "0", "--position_bias=0.4", "--seed=3"])
    assert (where.out, where.cache, where.seed) == ("x", None, 3)
    assert settings == PoolSettings(yes_bias=0.0, position_bias=0.4)
    assert parse(["--registries", "[pypi]"])[1].registries == ("pypi",)


@pytest.mark.parametrize(
    "wrong",
    [{"yes_bias": 1.2}, {"duplicates": -1}, {"scale": 0.0}, {"registries": ("npm",)}],
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong)).replace("_", "-")):
        PoolSettings(**wrong)


def _run(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mini", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_verbs_and_help():
    assert "build" in _run().stdout and _run("--help").returncode == 0
    help_text = _run("build", "--help").stdout
    assert "--position_bias" in help_text and "share of emoji_mcq" in help_text
    unknown = _run("biuld")
    assert unknown.returncode == 2 and "no verb 'biuld'" in unknown.stderr
    misspelt = _run("build", "--sed", "3")
    assert misspelt.returncode == 2 and misspelt.stderr.count("\n") == 1
    assert misspelt.stderr.startswith("error: --sed: no such flag (did you mean --seed?)")
