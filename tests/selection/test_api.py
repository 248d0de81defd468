"""Selection from Python: the bytes of the command line, its words for mistakes, own numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

import selection as sel
from llava.errors import UsageError
from mini.fixture_set import FIXTURE
from selection.__main__ import main
from selection.signals.forward import Forward
from tests.tiny_models import save_llava

ROOT = Path(__file__).parents[2]
PLUGIN = '''
from dataclasses import dataclass
from selection import Method, Scored

@dataclass(frozen=True)
class Settings:
    """One."""
    power: float = 1.0
    """of the draw"""

class Powers(Method):
    """Random numbers to a power."""
    Settings = Settings
    def score(self, context, rng):
        return Scored(context.keys(rng) ** self.settings.power)
'''
ARDS = {"n_clusters": 2, "subgroup_size": 3, "candidates": 6, "max_orders": 4}


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with a pool, its pictures, a proxy, target tasks, and a method's file."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copy(FIXTURE / "pool.json", folder)
    shutil.copytree(FIXTURE / "images", folder / "images")
    save_llava(folder / "proxy")
    records = json.loads((folder / "pool.json").read_bytes())
    (folder / "target.json").write_text(json.dumps(records[:4]))
    (folder / "targets.yaml").write_text("- {name: t, data: target.json, images: images}\n")
    (folder / "powers.py").write_text(PLUGIN)
    return folder


@pytest.fixture
def pool(desk) -> sel.Pool:
    return sel.Pool.open(desk / "pool.json", images=desk / "images")


@pytest.fixture
def numbers(pool) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(len(pool), 8)).astype(np.float32)


# ---- the same bytes ------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes | dict]:
    """All that a run writes, but for where it lies, how long it took and how it was asked for."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("manifest.json", "config.yaml")
    }
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name in ("times", "command", "checksum", "files"):
        del manifest[name]
    for signal in manifest["signals"].values():
        del signal["folder"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    apart = {name: config.pop(name) for name in ("out", "store")}
    assert apart["out"] == str(folder)
    return {**files, "manifest": manifest, "config": config}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("random_stratified", {"budget": 0.25, "seed": 3}),
        ("random", {"budget": 17, "limit": 40}),
        ("el2n", {"budget": "30%", "model": "proxy", "keep": "high", "batch_size": 4}),
        ("rds", {"budget": 0.3, "model": "proxy", "targets": "targets.yaml"}),
        ("ards", {"budget": 0.3, "model": "proxy", "preset": "as_released", **ARDS}),
        ("powers.py:Powers", {"budget": 0.5, "power": 2.5}),
    ],
)
def test_keywords_and_flags_give_the_same_bytes(desk, tmp_path, monkeypatch, method, settings):
    """Stores are not shared: what each way computes is compared too."""
    monkeypatch.chdir(desk)
    where = {"images": "images", "out": tmp_path / "python", "store": tmp_path / "python-store"}
    run = sel.select(method, "pool.json", **settings, **where)
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    flags += ["--pool", "pool.json", "--images", "images"]
    flags += ["--out", str(tmp_path / "flags"), "--store", str(tmp_path / "flags-store")]
    main(["select", method, *flags])
    python, command = contents(tmp_path / "python"), contents(tmp_path / "flags")
    assert {"subset.json", "subset_rows.txt", "scores.parquet", "run.json"} <= python.keys()
    assert python == command
    main(["verify", str(run.folder)])


def test_an_object_is_the_run_of_its_settings(desk, pool, tmp_path, monkeypatch):
    """By name, by class, by object: one run, which is run once."""
    monkeypatch.chdir(desk)
    powers = sel.methods.get_method("powers.py:Powers")
    out = tmp_path / "run"
    runs = [
        sel.select("powers.py:Powers", pool, power=2, out=out),
        sel.select(powers, pool, power=2.0, out=out),
        sel.select(powers(power=2.0), pool, out=out),
    ]
    assert len({run.manifest["environment"]["python"] for run in runs}) == 1
    assert len({json.dumps(run.manifest) for run in runs}) == 1
    with pytest.raises(UsageError, match=r"holds another run \(settings.power: 2.0 -> 3.0\)"):
        sel.select(powers(power=3.0), pool, out=out)


# ---- own numbers ---------------------------------------------------------------------------------


def test_scores_by_position_and_by_uid(pool, numbers, tmp_path):
    scores = numbers[:, 0].astype(np.float64)
    scores[[3, 4]] = np.nan
    run = sel.select(sel.Scores(scores), pool, budget=20, out=tmp_path / "position")
    assert run.rows.tolist() == sorted(np.argsort(-scores)[:20].tolist())
    assert run.scores["score"].to_pylist()[:4] == [*scores[:3].tolist(), None]
    records = json.loads(pool.path.read_bytes())
    assert json.loads(run.subset.read_bytes()) == [records[row] for row in run.rows]

    given = {pool.uid(row): scores[row] for row in range(len(pool)) if row != 3}
    named = sel.select(sel.Scores(given), pool, budget=20, out=tmp_path / "uid")
    assert named.subset.read_bytes() == run.subset.read_bytes() and named.scores == run.scores
    main(["verify", str(named.folder)])

    # Other scores are another run, whatever their order in the mapping is.
    turned = sel.Scores(dict(reversed(given.items())))
    assert turned.content() == sel.Scores(given).content()
    swapped = (
        sel.Scores({"a": 1.0, "b": 2.0}).content() != sel.Scores({"b": 1.0, "a": 2.0}).content()
    )
    assert swapped
    with pytest.raises(UsageError, match="holds another run"):
        sel.select(sel.Scores(-scores), pool, budget=20, out=tmp_path / "position")
    assert "only from there" in (run.folder / "config.yaml").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("scores", "told"),
    [
        ([1.0, 2.0], "Scores: 2 given for 60 samples"),
        ({"nothing": 1.0}, "Scores: none of the 1 uids is in"),
        ([[1.0], [2.0]], r"Scores: shape \(2, 1\); give one number a sample"),
        (["a"], "Scores: could not convert"),
        ([np.inf] * 60, "Scores: one is infinite; NaN keeps a sample out"),
    ],
)
def test_scores_that_are_not_the_pools(pool, scores, told, tmp_path):
    with pytest.raises(UsageError, match=told):
        sel.select(sel.Scores(scores), pool, out=tmp_path / "run")


def test_a_run_that_is_given_all_it_reads_needs_no_model(pool, numbers, tmp_path):
    run = sel.select("semdedup", pool, arrays={"mean_state": numbers}, out=tmp_path / "run")
    assert "mean_state of the given arrays was read as last_state" in run.manifest["notes"]
    same = sel.select("semdedup", pool, arrays={"last_state": numbers}, out=tmp_path / "same")
    assert same.scores == run.scores and same.manifest["proxy"] is None
    assert same.manifest["signals"]["forward"]["folder"] == "given arrays"
    with pytest.raises(UsageError, match=r"holds another run \(arrays.forward"):
        sel.select("semdedup", pool, arrays={"last_state": -numbers}, out=tmp_path / "same")


def test_what_a_store_holds_and_the_same_arrays_choose_alike(desk, pool, tmp_path):
    """Of methods that read signals of one kind, of several, and in a second stage."""
    from selection.store.store import StoreReader

    kind = {"model": desk / "proxy", "store": tmp_path / "store", "budget": 0.4}
    for method, settings in {"el2n": {}, "d2_pruning": {}, "ards": ARDS}.items():
        run = sel.select(method, pool, **kind, **settings, out=tmp_path / method)
        arrays = {}
        for name, signal in run.manifest["signals"].items():
            reader = StoreReader.open(signal["folder"])
            arrays[name] = {}
            for column in reader.columns.values():
                whole = np.zeros((len(pool), *column.shape), column.dtype)
                whole[reader.rows] = reader.column(column.name)
                arrays[name][column.name] = whole
        given = sel.select(
            method, pool, arrays=arrays, budget=0.4, **settings, out=tmp_path / f"{method}-given"
        )
        assert given.scores == run.scores and given.rows.tolist() == run.rows.tolist()


def test_a_checkpoint_that_nothing_reads_is_not_missed(pool, numbers, tmp_path):
    losses = numbers[:, :2].astype(np.float64)
    arrays = {"forward": {"nll_mean": losses[:, 0]}, "holdout": {"nll_mean": losses[:, 1]}}
    run = sel.select("rho_loss", pool, arrays=arrays, out=tmp_path / "run")
    np.testing.assert_array_equal(run.scores["score"], losses[:, 0] - losses[:, 1])


def test_given_arrays_beside_computed_signals(desk, pool, tmp_path):
    class Both(sel.Method):
        """Reads a given signal and a computed one."""

        def signals(self):
            return {"given": Forward(), "computed": Forward()}

        def score(self, context, rng):
            difference = context.values("given", "el2n") - context.values("computed", "el2n")
            return sel.Scored(difference)

    arrays = {"given": {"el2n": np.arange(len(pool), dtype=float)}}
    where = {"model": desk / "proxy", "store": tmp_path / "store"}
    run = sel.select(Both(), pool, arrays=arrays, **where, out=tmp_path / "run")
    assert run.manifest["proxy"] is not None
    assert run.manifest["signals"]["computed"]["folder"].startswith(str(tmp_path / "store"))
    assert np.ptp(np.diff(run.scores["score"])) > 0


def test_arrays_that_a_method_does_not_read(desk, pool, numbers, tmp_path):
    def told(method: str, arrays: dict, **settings) -> str:
        with pytest.raises(UsageError) as caught:
            sel.select(method, pool, arrays=arrays, out=tmp_path / method, **settings)
        return str(caught.value)

    assert told("random", {"x": numbers}) == "arrays: random reads no signal"
    assert "reads no signal clip; it reads forward, perturbed" in told("ards", {"clip": {}})
    assert "rho_loss reads one signal twice" in told("rho_loss", {"nll_mean": numbers[:, 0]})
    assert "forward.el2n is read too; give it beside aum" in told("el2n", {"aum": numbers[:, 0]})
    targets = {"targets": desk / "targets.yaml", "model": desk / "proxy"}
    assert "rds compares forward with" in told("rds", {"last_state": numbers}, **targets)


# ---- runs ----------------------------------------------------------------------------------------


def test_a_run_is_opened_from_its_folder(pool, tmp_path):
    run = sel.select("random", pool, budget=0.5, out=tmp_path / "run")
    again = sel.Run.open(tmp_path / "run")
    assert isinstance(again.scores, pa.Table) and again.scores == run.scores
    assert again.scores.column_names == ["row", "uid", "source", "score", "rank", "chosen"]
    assert again.rows.tolist() == np.flatnonzero(run.scores["chosen"]).tolist()
    assert repr(again) == f"<Run {tmp_path / 'run'}: random, 30 of 60 samples>"
    assert repr(pool).startswith(f"<Pool {pool.path}: 60 samples, ")
    with pytest.raises(KeyError, match="no artefact 'x'"):
        again.artefact("x")


def test_comparing_writes_only_where_it_is_told(pool, tmp_path, monkeypatch, capsys):
    first = sel.select("random", pool, budget=0.5, out=tmp_path / "first")
    sel.select("random", pool, budget=0.5, seed=1, out=tmp_path / "second")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    capsys.readouterr()
    shared = sel.compare(first, tmp_path / "second")
    out = capsys.readouterr().out
    assert "rank correlation" in out and "compare.json" not in out
    assert not list(Path().iterdir())
    assert sel.compare(first, tmp_path / "second", out="both") == shared
    assert {path.name for path in Path("both").iterdir()} == {"compare.json", "overlap.png"}
    assert json.loads(Path("both/compare.json").read_bytes()) == shared


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ards", {"budgt": 3}),
        ("ards", {"n_clusters": "abc"}),
        ("ards", {"n_clusters": 0}),
        ("ards", {"similarity": "median"}),
        ("ards", {"preset": "as_releasd"}),
        ("ards", {"targets": "targets.yaml"}),
        ("rds", {"model": "proxy"}),
        ("adrs", {}),
        ("nothing.py:Mine", {}),
        ("el2n", {}),
        ("el2n", {"model": "nowhere"}),
        ("random", {"budget": 61}),
        ("random", {"budget": 1.5}),
        ("random", {"limit": 0}),
        ("rho_loss", {"model": "proxy"}),
        ("less", {"model": "proxy", "targets": "targets.yaml", "checkpoints": ("a", "b")}),
    ],
)
def test_mistakes_are_told_in_the_words_of_the_command(
    desk, monkeypatch, tmp_path, method, settings
):
    monkeypatch.chdir(desk)

    def mistake(work) -> tuple[type, str]:
        with pytest.raises(UsageError) as caught:
            work()
        return type(caught.value), str(caught.value)

    flags = ["--pool", "pool.json", "--images", "images"]
    for name, value in settings.items():
        value = f"[{','.join(value)}]" if isinstance(value, tuple) else str(value)
        flags += [f"--{name}", value]
    outs = (str(tmp_path / "a"), str(tmp_path / "b"))
    python = partial(sel.select, method, "pool.json", images="images", out=outs[0], **settings)
    assert mistake(python) == mistake(lambda: main(["select", method, *flags, "--out", outs[1]]))


def test_objects_that_cannot_be_meant(desk, pool):
    class Plain(sel.Method):
        """Without settings."""

    def told(*args, **settings) -> str:
        with pytest.raises(UsageError) as caught:
            sel.select(*args, **settings)
        return str(caught.value)

    assert told(3, pool) == "method 3: give a name, a Method or Scores"
    assert told(dict, pool).startswith("method <class 'dict'>: give a name")
    assert told("random", pool, images="x", limit=3).startswith(
        "images, limit: give it to Pool.open"
    )
    ards = sel.methods.get_method("ards")
    assert told(ards(), pool, preset="as_released", n_clusters=3) == (
        "preset, n_clusters: the method object has its settings already"
    )
    assert told(Plain(), pool, sedd=3).startswith("--sedd: no such flag (did you mean --seed?)")
    assert (
        told("random", desk / "absent.json")
        == f"{desk / 'absent.json'}: no such pool file: check --pool"
    )


def test_names_are_public_and_found_late():
    assert set(sel.__all__) <= set(dir(sel))
    for name in sel.__all__:
        assert getattr(sel, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'selct'"):
        sel.selct  # noqa: B018


# ---- a start without weight ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["select", "--help"],
        ["select", "ards", "--help"],
        ["select", "ards", "--budgt", "3"],
    ],
    ids=" ".join,
)
def test_lists_help_and_wrong_flags_answer_at_once(words):
    """CPU seconds of the whole process, and that none of the slow modules is loaded."""
    script = f"""
import resource, sys
from selection.__main__ import main
try:
    main({words})
except (SystemExit, Exception):
    pass
slow = {{"torch", "transformers", "pyarrow", "faiss", "scipy", "matplotlib"}} & sys.modules.keys()
used = resource.getrusage(resource.RUSAGE_SELF)
print("\\n" + str([sorted(slow), used.ru_utime + used.ru_stime]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    slow, seconds = json.loads(done.stdout.splitlines()[-1].replace("'", '"'))
    assert slow == []
    assert seconds < 1
