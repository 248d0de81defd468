"""P2: the subset is exact. P7: the run folder records everything, and tampering is found."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from types import SimpleNamespace

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava.errors import StorageError, UsageError
from selection.output import folder as export
from selection.output.environment import environment, environment_changes
from selection.output.verify import inspect_run, verify_run
from selection.pool.pool import Pool
from selection.rules.budget import top_k
from tests.faults import faulty_os, flip_bit, snapshot


@dataclass(frozen=True)
class Settings:
    alpha: float = 0.5


METHOD = SimpleNamespace(name="made_up", settings=Settings())


def record(i: int, **keys) -> dict:
    turns = [{"from": "human", "value": f"Q {i} ü?"}, {"from": "gpt", "value": "A"}]
    return {"id": i, "conversations": turns} | keys


def make_pool(folder, n=12, bad=(), **options) -> Pool:
    records = [record(i, **({"image": 3} if i in bad else {})) for i in range(n)]
    path = folder / "pool.json"
    path.write_text(json.dumps(records, **options))
    return Pool.open(path)


def write(out, pool, scores, k, **changes):
    scored = SimpleNamespace(scores=scores, artefacts={}, notes=("a note",))
    options = dict(
        pool=pool,
        method=METHOD,
        scored=scored,
        rows=top_k(scores, k).rows,
        config="budget: 0.3\n",
        identity={"sha256": "abc"},
        signals={"forward": {"fingerprint": "def"}},
        bad=[],
        seed=3,
        times={"score": 1.5},
    )
    export.write_run(out, **(options | changes))
    return json.loads((out / "manifest.json").read_bytes())


@pytest.fixture
def run(tmp_path):
    """A run with ties, one sample bad in the pool and one that a signal could not score."""
    pool = make_pool(tmp_path, bad=[4])
    scores = np.array([3, 1, 2, 2, np.nan, 5, 2, np.nan, -1, 2, 0, 2.5])
    bad = [{"row": 7, "uid": "x", "reason": "image missing"}, {"row": 4, "reason": "second"}]
    scored = SimpleNamespace(
        scores=scores, artefacts={"labels": np.arange(3), "groups": {"a": [1]}}, notes=()
    )
    write(tmp_path / "run", pool, scores, 5, scored=scored, bad=bad)
    return tmp_path / "run"


def test_files_hold_what_the_manifest_says(run):
    manifest = json.loads((run / "manifest.json").read_bytes())
    assert np.loadtxt(run / "subset_rows.txt").tolist() == [0, 2, 3, 5, 11]
    assert [sample["id"] for sample in json.loads((run / "subset.json").read_bytes())] == [
        0, 2, 3, 5, 11,
    ]  # fmt: skip
    table = pq.read_table(run / "scores.parquet").to_pydict()
    assert table["rank"] == [2, 8, 4, 5, None, 1, 6, None, 10, 7, 9, 3]
    assert table["score"][5] == 5 and table["score"][4] is None
    assert [i for i, chosen in enumerate(table["chosen"]) if chosen] == [0, 2, 3, 5, 11]
    lines = (run / "bad_samples.jsonl").read_bytes().splitlines()
    bad = [msgspec.json.decode(line) for line in lines]
    assert [(b["row"], b["id"], b["uid"]) for b in bad] == [
        (4, 4, table["uid"][4]),
        (7, 7, table["uid"][7]),
    ]
    assert "image" in bad[0]["reason"] and bad[1]["reason"] == "image missing"
    assert manifest["method"] == {"name": "made_up", "settings": {"alpha": 0.5}}
    assert manifest["subset"]["n"] == 5 and manifest["n_bad"] == 2
    assert (manifest["subset"]["n_tied"], manifest["subset"]["n_tied_chosen"]) == (4, 2)
    assert [text.split()[0] for text in manifest["warnings"]] == ["2", "4"]
    assert np.load(run / "artefacts/labels.npy").tolist() == [0, 1, 2]
    assert json.loads((run / "artefacts/groups.json").read_bytes()) == {"a": [1]}
    assert set(manifest["files"]) == set(snapshot(run)) - {"manifest.json"}
    assert manifest["environment"] == environment()


def test_sound_run_passes(run, capsys):
    findings = inspect_run(run)
    assert not findings.problems and not findings.warnings
    verify_run(run)
    assert capsys.readouterr().out == f"{run}: sound\n"


def test_every_changed_byte_of_every_file_is_found(run):
    for name, data in snapshot(run).items():
        for at in {0, len(data) // 3, len(data) // 2, len(data) - 1}:
            flip_bit(run / name, at, 2)
            (problem,) = inspect_run(run).problems
            assert problem.startswith(name)
            (run / name).write_bytes(data)
        (run / name).unlink()
        assert inspect_run(run).problems[0].startswith(name)
        with pytest.raises(StorageError):
            verify_run(run)
        (run / name).write_bytes(data)


def test_what_is_no_run_and_what_is_not_finished_are_told_apart(run, tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(UsageError, match="no run folder"):
            verify_run(folder)
    (run / "run.json").write_text("{}")
    (run / "manifest.json").unlink()
    assert inspect_run(run).problems == [
        "manifest.json is absent: the run is not finished, or lost it"
    ]
    with pytest.raises(StorageError, match="1 problem: "):
        verify_run(run)


def test_every_manifest_field_is_guarded(run):
    """P7: tamper with each field."""
    original = (run / "manifest.json").read_bytes()
    for field in json.loads(original):
        manifest = json.loads(original) | {field: "tampered"}
        (run / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        assert inspect_run(run).problems == ["manifest.json is damaged or edited"]


def reseal(run, **files):
    """Change files and make every hash agree again, as a bug in the writer would."""
    manifest = export.unseal(run / "manifest.json")
    for name, data in files.items():
        name = name.replace("__", ".")
        (run / name).write_bytes(data)
        manifest["files"][name] = export.describe_file(run / name)
    manifest["subset"]["sha256"] = manifest["files"]["subset.json"]["sha256"]
    (run / "manifest.json").write_bytes(export.seal(manifest))
    return inspect_run(run).problems


def test_contents_that_disagree_are_found(run):
    subset, rows = (run / "subset.json").read_bytes(), (run / "subset_rows.txt").read_bytes()
    assert reseal(run) == []
    assert any("records" in p for p in reseal(run, subset__json=subset.replace(b"Q 5", b"Q 6")))
    assert any("records" in p for p in reseal(run, subset__json=subset.replace(b"\n", b"\n ")))
    assert reseal(run, subset__json=subset) == []
    assert any("ascending" in p for p in reseal(run, subset_rows__txt=b"0\n3\n2\n5\n11\n"))
    assert any("another size" in p for p in reseal(run, subset_rows__txt=b"0\n2\n3\n5\n"))
    assert any("as chosen" in p for p in reseal(run, subset_rows__txt=b"0\n2\n4\n5\n11\n"))
    assert any("bad sample" in p for p in reseal(run, subset_rows__txt=b"0\n2\n4\n5\n11\n"))
    assert any("records" in p for p in reseal(run, subset_rows__txt=b"0\n2\n3\n5\n99\n"))
    assert reseal(run, subset_rows__txt=rows) == []


@pytest.mark.parametrize("column", ["score", "rank", "chosen", "row", "uid"])
def test_scores_that_disagree_are_found(run, column):
    table = pq.read_table(run / "scores.parquet")
    order = [1, 0, *range(2, 12)]
    i = table.column_names.index(column)
    table = table.set_column(i, column, table[column].take(order))
    pq.write_table(table, run / "new")
    assert reseal(run, scores__parquet=(run / "new").read_bytes())


def test_changed_pool_and_environment_are_warnings(run, monkeypatch):
    pool = run.parent / "pool.json"
    pool.write_bytes(pool.read_bytes() + b"\n")
    findings = inspect_run(run)
    assert not findings.problems and "has changed since" in findings.warnings[0]
    pool.unlink()
    assert "no such pool file" in inspect_run(run).warnings[0]
    old = environment()
    changed = {**old, "python": "2.7", "versions": {**old["versions"], "torch": "0.4"}}
    lines = environment_changes(changed, old)
    assert [line.split(":")[0] for line in lines] == ["python", "torch"]
    without = {name: v for name, v in old["versions"].items() if name != "numpy"}
    assert environment_changes(old, {**old, "versions": without})[0].endswith("-> absent")


def test_environment_names_what_changes_numbers():
    found = environment()
    wanted = {"torch", "transformers", "numpy", "pillow", "msgspec", "sentencepiece", "faiss-cpu"}
    assert wanted <= set(found["versions"]) and found["device"] and found["python"]


@pytest.mark.parametrize(
    "rows", [[2, 1], [1, 1], [-1, 3], [3, 12], [4], [7]], ids=str
)  # 4 is bad in the pool, 7 has no score
def test_rows_that_break_the_law_are_refused(tmp_path, rows):
    pool = make_pool(tmp_path, bad=[4])
    scores = np.arange(12.0)
    scores[7] = np.nan
    with pytest.raises(ValueError):
        write(tmp_path / "run", pool, scores, 2, rows=np.array(rows))
    assert not list((tmp_path / "run").iterdir())


def test_empty_results_are_valid(tmp_path):
    pool = make_pool(tmp_path)
    manifest = write(tmp_path / "run", pool, np.zeros(12), 0, identity=None)
    assert manifest["subset"]["cut"] is None
    assert json.loads((tmp_path / "run/subset.json").read_bytes()) == []
    assert not inspect_run(tmp_path / "run").problems


def test_fault_at_every_system_call_then_again(tmp_path):
    """P8: the manifest comes last; the same run again gives the same files."""
    pool, scores = make_pool(tmp_path), np.arange(12.0)
    with faulty_os() as shim:
        write(tmp_path / "reference", pool, scores, 4)
    expected = snapshot(tmp_path / "reference")
    for at in range(len(shim.calls)):
        out = tmp_path / str(at)
        with faulty_os(at, errno.ENOSPC), pytest.raises(StorageError):
            write(out, pool, scores, 4)
        if (out / "manifest.json").exists():
            assert at >= len(shim.calls) - 2  # only syncing its folder was left
        write(out, pool, scores, 4)
        assert snapshot(out) == expected
        assert not inspect_run(out).problems


@st.composite
def selections(draw):
    n = draw(st.integers(1, 40))
    score = st.one_of(st.just(float("nan")), st.sampled_from([0.0, -0.0, 1.0]), st.floats(-9, 9))
    scores = np.array(draw(st.lists(score, min_size=n, max_size=n)))
    k = draw(st.integers(0, int((~np.isnan(scores)).sum())))
    return scores, k, draw(st.sampled_from([None, 2])), draw(st.booleans())


@settings(deadline=None, max_examples=60)
@given(selections())
def test_subset_is_pure(tmp_path_factory, selection):
    """P2: unchanged bytes, input order, no row twice, exactly k, whatever ties and NaN."""
    scores, k, indent, lines = selection
    folder = tmp_path_factory.mktemp("run")
    pool = make_pool(folder, len(scores), indent=indent)
    if lines:
        (folder / "pool.jsonl").write_bytes(
            b"\n".join(msgspec.json.encode(record(i)) for i in range(len(scores)))
        )
        pool = Pool.open(folder / "pool.jsonl")
    rows = top_k(scores, k).rows
    export.write_subset(pool, rows, folder)
    raws = [bytes(raw) for raw in msgspec.json.decode(
        (folder / "subset.json").read_bytes(), type=list[msgspec.Raw])]  # fmt: skip
    assert raws == [pool.raw(row) for row in rows] and len(raws) == k
    assert (np.diff(rows) > 0).all() and not np.isnan(scores[rows]).any()
    listed = (folder / "subset_rows.txt").read_text().split()
    assert [int(row) for row in listed] == rows.tolist()
    best = sorted(np.flatnonzero(~np.isnan(scores)), key=lambda i: (-scores[i], i))[:k]
    assert sorted(best) == rows.tolist()
