"""The oracle report against slow counts."""

from __future__ import annotations

import json
import re

import numpy as np

from mini.report import Share, main, newest_run, oracle_shares, random_rows
from selection.__main__ import main as select
from selection.pool.pool import Pool


def write(folder, n=60):
    labels = [
        {
            "noisy": int(i % 7 == 0),
            "dup": int(i % 11 == 0),
            "biased": ("", "yes", "position+colour")[i % 3],
        }
        for i in range(n)
    ]
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    records = [{"id": i, "conversations": turns, "meta": meta} for i, meta in enumerate(labels)]
    path = folder / "pool.json"
    path.write_text(json.dumps(records))
    return path, labels


def test_shares_are_counts(tmp_path):
    path, labels = write(tmp_path)
    pool, rows = Pool.open(path), np.arange(0, 60, 4)
    drawn = random_rows(pool, len(rows), seed=0)
    shares = {share.label.strip(): share for share in oracle_shares(pool, rows, drawn)}

    def count(has, part):
        return sum(bool(has(labels[row])) for row in part)

    rules = {
        "any bias": lambda m: m["biased"],
        "yes": lambda m: "yes" in m["biased"],
        "colour": lambda m: "colour" in m["biased"],
        "position": lambda m: "position" in m["biased"],
        "noisy": lambda m: m["noisy"],
        "duplicate": lambda m: m["dup"],
    }
    assert set(shares) == set(rules)
    for name, has in rules.items():
        found = shares[name]
        counts = [count(has, part) for part in (range(60), rows, drawn)]
        assert found == Share(found.label, *counts)


def test_random_rows_depend_on_the_seed_alone(tmp_path):
    pool = Pool.open(write(tmp_path)[0])
    first = random_rows(pool, 20, seed=0)
    assert len(set(first.tolist())) == 20
    assert (first == random_rows(pool, 20, seed=0)).all()
    assert (first != random_rows(pool, 20, seed=1)).any()


def test_a_folder_of_runs_is_compared_by_label(tmp_path, capsys):
    pool, labels = write(tmp_path)
    subsets = {"first": range(0, 60, 7), "second": range(60)}
    for name, rows in subsets.items():
        run = tmp_path / "outputs" / "all" / name
        run.mkdir(parents=True)
        (run / "manifest.json").write_text(json.dumps({"pool": {"path": str(pool), "n": 60}}))
        (run / "subset_rows.txt").write_text("".join(f"{row}\n" for row in rows))
    assert newest_run(tmp_path / "outputs") == tmp_path / "outputs" / "all"
    main(["--run", str(tmp_path / "outputs" / "all")])
    printed = capsys.readouterr().out.splitlines()
    _, headings, *lines = (re.split(" {2,}", line.strip()) for line in printed)
    noisy = sum(label["noisy"] for label in labels) / 60
    shares = {line[0]: line[headings.index("noisy")] for line in lines}
    assert shares["pool"] == shares["second"] == f"{noisy:.1%}" and "first" in shares


def test_a_run_is_held_against_random_and_the_runs_beside_it(tmp_path, capsys):
    """Of the same pool and size; others are left out, damaged ones too."""
    pool, _ = write(tmp_path)
    outputs = tmp_path / "outputs"
    asked = {"mine": ("0.2", "0"), "like": ("0.2", "1"), "larger": ("0.5", "0")}
    for name, (budget, seed) in asked.items():
        flags = ["--pool", str(pool), "--budget", budget, "--seed", seed]
        select(["select", "random", *flags, "--out", str(outputs / name)])
    (outputs / "damaged").mkdir()
    (outputs / "damaged" / "manifest.json").write_text("{")
    main(["--run", str(outputs / "mine")])
    found = json.loads((outputs / "mine/report/compare.json").read_text())
    mine, like = (
        np.loadtxt(outputs / name / "subset_rows.txt", dtype=int) for name in ("mine", "like")
    )
    common = len(np.intersect1d(mine, like)) / 12
    assert found["overlap"] == [[1, common, 1], [common, 1, common], [1, common, 1]]
    assert (outputs / "mine/report/overlap.png").read_bytes().startswith(b"\x89PNG")
    assert "2 like" in capsys.readouterr().out
