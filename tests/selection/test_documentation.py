"""docs/Python.md: every block runs in the order of the page, the commands as processes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mini.fixture_set import FIXTURE
from selection.output.folder import Run
from tests.tiny_models import save_llava

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs/Python.md").read_text(), re.DOTALL)


def blocks(kind: str) -> list[str]:
    return [text for name, text in BLOCKS if name == kind]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with what the page names: pool, pictures, a proxy, and the method's file."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copy(FIXTURE / "pool.json", folder)
    shutil.copytree(FIXTURE / "images", folder / "data")
    save_llava(folder / "checkpoints/proxy")
    (plugin,) = [text for text in blocks("python") if "class Surprise" in text]
    (folder / "surprise.py").write_text(plugin)
    return folder


def run(desk: Path, *words: str) -> str:
    """What `python words` prints; it has to end well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], cwd=desk, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def commands(desk) -> dict[str, str]:
    """What each of the page's commands printed, by what follows `python -m`."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return {line[len("python -m ") :]: run(desk, *shlex.split(line)[1:]) for line in lines}


def test_the_commands_of_the_page(desk, commands):
    help_text = " ".join(commands["selection select surprise.py:Surprise --help"].split())
    assert "--target TARGET loss per answer token, in nats, that a sample should have" in help_text
    outputs = desk / "outputs"
    first, again = Run.open(outputs / "surprise"), Run.open(outputs / "again")
    assert first.subset.read_bytes() == again.subset.read_bytes()
    assert first.scores == again.scores
    assert first.manifest["method"] == again.manifest["method"]
    assert first.manifest["method"]["origin"] == f"{desk / 'surprise.py'}:Surprise"
    assert first.manifest["method"]["settings"] == {"target": 3.0, "noise": 0.0}
    assert {run.name for run in (outputs / "all").iterdir()} == {"compare", "random", "surprise"}
    assert commands["selection.methods.contract surprise.py:Surprise"].count("holds ") == 7
    assert json.loads((outputs / "compare/compare.json").read_text())["overlap"] == [[1, 1], [1, 1]]


def test_the_python_of_the_page_in_one_interpreter(desk, commands):
    script = "\n".join(text for text in blocks("python") if "class Surprise" not in text)
    out = run(desk, "-c", script)
    assert "el2n: 18 of 60 samples in outputs/el2n/subset.json" in out
    assert "mean_state of the given arrays was read as last_state" in out
    assert f"outputs/surprise-{desk.name}-0.3 already holds this run" in out


def test_the_page_names_what_there_is():
    import selection

    page = (ROOT / "docs/Python.md").read_text()
    for name in re.findall(r"sel\.(\w+)", page):
        assert name in selection.__all__
    assert "nineteen examples" in page
