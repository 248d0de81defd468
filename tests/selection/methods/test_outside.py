"""Methods from outside: files, packages, classes of a session, and what identifies them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llava.errors import UsageError
from selection import select
from selection.__main__ import main
from selection.methods import find_methods, get_method
from selection.methods.source import session_digest
from selection.output.folder import Run

ROOT = Path(__file__).parents[3]
MINE = '''
from dataclasses import dataclass
import numpy as np
from selection import Method, Scored

@dataclass(frozen=True)
class Settings:
    """One."""
    my_flag: int = 1
    """a number"""

class Mine(Method):
    """Scores of mine."""
    Settings = Settings
    def score(self, context, rng):
        return Scored(context.keys(rng) * self.settings.my_flag)
'''
SIGNAL = '''
import numpy as np
from dataclasses import dataclass
from selection import Method, Request, Scored, SecondStage
from selection.signals.base import OwnModelSignal
from selection.store.key import Column

@dataclass(frozen=True)
class Letters(OwnModelSignal):
    """How long the first question is."""
    name = "letters"
    reads_images = False
    def open_model(self, pool, readers, settings):
        return self
    def identity(self):
        return {"letters": 1}
    def columns(self, scorer):
        return [Column("n", (), "float32")]
    def prepare(self, scorer, sample):
        return Item(len(sample.record.first_human))
    def compute(self, scorer, items):
        return {"n": np.array([item.n for item in items], np.float32)}

@dataclass
class Item:
    n: int
    n_tokens = 1
    key = 0

class Lengths(Method):
    """Long questions, asked for in a second stage."""
    def second_stage(self, context, rng):
        return SecondStage({"letters": Request(Letters(), np.arange(len(context.pool)))})
    def score(self, context, rng):
        return Scored(context.values("letters", "n"))
'''


@pytest.fixture
def pool(tmp_path) -> Path:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    records = [{"id": i, "conversations": turns} for i in range(40)]
    for i, record in enumerate(records):
        record["conversations"] = [{"from": "human", "value": "?" * (i * 7 % 40 + 1)}, turns[1]]
    path = tmp_path / "pool.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture
def mine(tmp_path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return path


def run(pool: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=pool.parent,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_other_contents_are_another_run(pool, mine, tmp_path):
    flags = ["select", f"{mine}:Mine", "--pool", str(pool), "--out", str(tmp_path / "run")]
    main([*flags, "--my_flag", "3"])
    first = Run.open(tmp_path / "run").manifest["method"]
    assert first["settings"] == {"my_flag": 3} and first["origin"] == f"{mine}:Mine"
    again = ["select", "--method", *flags[1:], "--my_flag", "3"]
    main(again)  # it is there already

    # The same size and the same second: Python's own cache would run the old code.
    stat = mine.stat()
    mine.write_text(MINE.replace("keys(rng) *", "keys(rng) -"))
    os.utime(mine, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UsageError, match=r"holds another run \(code.sha256: "):
        main([*flags, "--my_flag", "3"])
    main([*flags, "--my_flag", "3", "--force-new"])
    other = Run.open(tmp_path / "run-2")
    assert other.manifest["method"]["sha256"] != first["sha256"]
    assert max(other.scores["score"].to_pylist()) < 0
    assert not (tmp_path / "__pycache__").exists()


def test_its_config_replays_it(pool, mine, tmp_path):
    made = select(f"{mine}:Mine", pool, my_flag=2, out=tmp_path / "run")
    config = str(tmp_path / "run/config.yaml")
    main(["select", "--config", config, "--out", str(tmp_path / "again")])
    main(["select", f"{mine}:Mine", "--config", config, "--out", str(tmp_path / "named")])
    for name in ("again", "named"):
        again = Run.open(tmp_path / name)
        assert again.subset.read_bytes() == made.subset.read_bytes()
        assert again.manifest["method"] == made.manifest["method"]
    main(["verify", str(tmp_path / "again")])


def test_all_runs_it_beside_others(pool, mine, tmp_path, capsys):
    methods = f"[random,{mine}:Mine,random_stratified]"
    main(["all", "--pool", str(pool), "--methods", methods, "--out", str(tmp_path / "all")])
    assert {"mine", "random", "random_stratified", "compare"} == {
        path.name for path in (tmp_path / "all").iterdir()
    }
    assert "not run" not in capsys.readouterr().out


def test_two_processes_agree_on_a_signal_of_the_file(pool, tmp_path):
    (tmp_path / "lengths.py").write_text(SIGNAL)
    words = ["selection", "select", "lengths.py:Lengths", "--pool", str(pool), "--store", "store"]
    words += ["--block_size", "8", "--budget", "10"]
    launch = ["llava.launch", "--standalone", "--nproc_per_node", "2", "-m"]
    done = run(pool, *launch, *words, "--out", "two", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    where = {"store": tmp_path / "one-store", "out": tmp_path / "one"}
    one = select(f"{tmp_path}/lengths.py:Lengths", pool, budget=10, **where)
    two = Run.open(tmp_path / "two")
    assert two.rows.tolist() == one.rows.tolist() and two.scores == one.scores


@pytest.mark.parametrize(
    ("text", "spec", "told"),
    [
        (None, "no.py:Mine", "no Python file no.py; give path/to/file.py:Class"),
        (MINE, "mine.py", "name the class in it too: mine.py:Class"),
        (MINE, "mine.py:Other", "mine.py has no method 'Other' .*; it has Mine"),
        (MINE, "mine.py:Settings", "mine.py has no method 'Settings'"),
        ("class Mine(", "mine.py:Mine", r"SyntaxError: '\(' was never closed"),
        ("import nothing_like_it", "mine.py:Mine", "line 1: ModuleNotFoundError: No module named"),
        ("x = 1\nx / 0", "mine.py:Mine", "line 2: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)", "mine.py:Mine", "line 2: SystemExit: 3"),
        (MINE.replace("Mine(", "Random("), "mine.py:Random", "the name 'random' is taken"),
        (MINE.replace("my_flag", "seed"), "mine.py:Mine", "its settings seed are flags of all"),
        (MINE.replace("my_flag", "preset"), "mine.py:Mine", "its settings preset are flags of all"),
        (MINE, "mine.py:Mine --my_flga 3", r"--my_flga: no such flag \(did you mean --my_flag"),
        (MINE, "mine.py:Mine --my_flag x", "--my_flag x: expected int"),
    ],
)
def test_whatever_is_wrong_is_one_line(tmp_path, monkeypatch, text, spec, told):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("mine.py").write_text(text)
    with pytest.raises(UsageError, match=told) as caught:
        main(["select", *spec.split(), "--pool", "pool.json"])
    assert "\n" not in str(caught.value)


# ---- packages ------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes an installed package with an entry point: its module, and what pip would write."""

    def make(entry: str, text: str = MINE, name: str = "my_package") -> None:
        (tmp_path / f"{name}_code.py").write_text(text)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[robust_selection.methods]\n{entry}\n")
        monkeypatch.syspath_prepend(str(tmp_path))

    yield make
    for module in ("my_package_code", "other_code"):
        sys.modules.pop(module, None)


def test_an_installed_package_is_listed_run_and_replayed(pool, package, tmp_path, capsys):
    package("from_afar = my_package_code:Mine")
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.startswith("from_afar")]
    assert "Scores of mine." in lines[at] and lines[at + 1].endswith("from my_package_code")
    assert len(find_methods()) == 20
    main(["select", "from_afar", "--pool", str(pool), "--out", str(tmp_path / "run")])
    method = Run.open(tmp_path / "run").manifest["method"]
    assert method["name"] == method["origin"] == "from_afar" and len(method["sha256"]) == 64
    config = str(tmp_path / "run/config.yaml")
    main(["select", "--config", config, "--out", str(tmp_path / "again")])
    again = Run.open(tmp_path / "again")
    assert again.subset.read_bytes() == Run.open(tmp_path / "run").subset.read_bytes()


def test_a_setting_without_a_default_is_a_flag_that_has_to_be_given(
    pool, package, tmp_path, capsys
):
    package("far = my_package_code:Mine", MINE.replace("my_flag: int = 1", "my_flag: int"))
    main(["list"])
    assert "reads what its settings say; from my_package_code" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--my_flag is missing"):
        main(["select", "far", "--pool", str(pool), "--out", str(tmp_path / "run")])
    assert select("far", pool, my_flag=2, out=tmp_path / "run").manifest["subset"]["n"] == 12


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("random = my_package_code:Mine", "random of my_package: the name is taken"),
        ("far = my_package_code:Settings", "my_package_code:Settings is no subclass of selection"),
        ("far = my_package_code:Other", "AttributeError"),
        ("far = no_such_code:Mine", "ModuleNotFoundError"),
    ],
)
def test_a_broken_package_is_named(package, entry, told):
    package(entry)
    with pytest.raises(UsageError, match=f"entry point .* of my_package: .*{told}|{told}"):
        find_methods()


def test_two_packages_of_one_name_are_told_apart_by_nobody(package):
    package("far = my_package_code:Mine")
    package("far = other_code:Mine", name="other")
    with pytest.raises(UsageError, match="entry point far of .*: the name is taken"):
        get_method("random")


def test_a_broken_package_does_not_stop_the_methods_of_the_house(package):
    package("far = no_such_code:Mine")
    assert get_method("random").name == "random"


# ---- classes of a session ------------------------------------------------------------------------

CELL = '''
from selection import Method
FACTOR = 2.0
TABLE = {"a": {1, 2, 3}, "b": [4.0]}
def helper(x):
    return [y * FACTOR for y in x]
def unused(x):
    return x
class Mine(Method):
    """Scores of mine."""
    sizes = (1, 2)
    @property
    def size(self):
        return self.sizes[0]
    def score(self, context, rng):
        return helper(TABLE["b"]) + self.size
'''


def digest_in_a_session(text: str) -> str:
    """As in a notebook: of a class in `__main__`, of which there is no file."""
    script = "import sys\nexec(sys.argv[1])\nprint(Mine.origin, Mine().content()['sha256'])"
    done = subprocess.run(
        [sys.executable, "-c", script, text], cwd=ROOT, capture_output=True, text=True, check=True
    )
    origin, digest = done.stdout.split()
    assert origin == "None"
    return digest


def test_a_class_of_a_session_is_what_its_functions_do():
    first = digest_in_a_session(CELL)
    unchanged = ["# a comment\n" + CELL, CELL.replace("return x\n", "return 2 * x\n")]
    for text in unchanged:
        assert digest_in_a_session(text) == first
    for old, new in {
        "FACTOR = 2.0": "FACTOR = 2.5",
        "y * FACTOR": "y + FACTOR",
        "[4.0]": "[5.0]",
        "{1, 2, 3}": "{1, 2}",
        "(1, 2)": "(2, 2)",
        "self.sizes[0]": "self.sizes[1]",
        "+ self.size": "+ self.seed",
    }.items():
        assert digest_in_a_session(CELL.replace(old, new)) != first


def test_a_class_inside_a_function_is_its_code_too():
    def maker(power: float):
        class Local:
            def score(self, context, rng):
                return power

        return Local

    assert session_digest(maker(1.0)) == session_digest(maker(1.0)) != session_digest(maker(2.0))
