"""The table of runs: its numbers are the runs' own, in every format."""

from __future__ import annotations

import csv
import io
import json

import pytest

from llava.eval.__main__ import main
from llava.eval.numbers import COLUMNS
from llava.eval.show.table import Group, Table, render
from llava.launch import process

TABLE = Table(
    [
        Group("sqa", "ScienceQA", {"clean": "Clean", "pa": "PA"}),
        Group("mme", "MME", {"perception": "perception"}),
    ],
    {
        "a_b": {("sqa", "clean"): 70.0, ("sqa", "pa"): 50.001, ("mme", "perception"): 1500.0},
        "c": {("sqa", "clean"): 9.5, ("sqa", "pa"): 50.004},
        "d": {("sqa", "clean"): 9.5, ("sqa", "pa"): 0.0, ("mme", "perception"): 1500.0},
    },
)


def test_markdown_marks_the_best_and_what_is_missing():
    assert render(TABLE, "markdown").splitlines() == [
        "| model | ScienceQA Clean |        PA | MME perception |",
        "| ----- | --------------: | --------: | -------------: |",
        "| a_b   |       **70.00** | **50.00** |        1500.00 |",
        "| c     |            9.50 | **50.00** |              – |",
        "| d     |            9.50 |      0.00 |        1500.00 |",
    ]


def test_latex():
    assert render(TABLE, "latex").splitlines() == [
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r" & \multicolumn{2}{c}{ScienceQA} & \multicolumn{1}{c}{MME} \\",
        r"\cmidrule(lr){2-3} \cmidrule(lr){4-4}",
        r"Model & Clean & PA & perception \\",
        r"\midrule",
        r"a\_b & \textbf{70.00} & \textbf{50.00} & 1500.00 \\",
        r"c & 9.50 & \textbf{50.00} & -- \\",
        r"d & 9.50 & 0.00 & 1500.00 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_csv_keeps_all_digits():
    assert render(TABLE, "csv").splitlines() == [
        "model,sqa/clean,sqa/pa,mme/perception",
        "a_b,70.0,50.001,1500.0",
        "c,9.5,50.004,",
        "d,9.5,0.0,1500.0",
    ]


@pytest.mark.parametrize(("n", "widths"), [(4, [20]), (5, [20, 5]), (8, [20, 20])])
def test_four_attacked_benchmarks_side_by_side(n, widths):
    groups = [Group(str(i), str(i), dict.fromkeys(COLUMNS, "")) for i in range(n)]
    assert [len(block.keys()) for block in Table(groups, {}).blocks()] == widths


@pytest.fixture
def program(capsys):
    """Run a verb; returns exit code, output and errors."""

    def run(*words):
        try:
            process(lambda: main(list(map(str, words))))
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("reading", ["exact", "logit"])
def test_the_numbers_are_those_of_the_runs(asked, program, reading):
    runs = [asked("pope"), asked("seed"), asked("sqa", "twin")]
    code, out, err = program("table", *runs, "--format", "csv", "--reading", reading)
    assert (code, err.count("the first 3 items")) == (0, 3)
    m, twin = csv.DictReader(io.StringIO(out))
    assert [m.pop("model"), twin.pop("model")] == ["m", "twin"]
    pope, seed, sqa = (json.loads((run / "summary.json").read_bytes()) for run in runs)
    assert list(m) == [*(f"{name}/{key}" for name in ("sqa", "seed") for key in COLUMNS), "pope/f1"]
    assert float(m["pope/f1"]) == pope["published"]["f1"] and twin["pope/f1"] == ""
    for key in COLUMNS:
        assert float(m[f"seed/{key}"]) == seed["readings"][reading]["counted"][key]
        assert float(twin[f"sqa/{key}"]) == sqa["readings"][reading]["counted"][key]
        assert m[f"sqa/{key}"] == twin[f"seed/{key}"] == ""


def test_a_run_without_attacks_has_clean_alone(asked, program):
    code, out, _ = program("table", asked("seed", attacks="clean"), "--format", "csv")
    clean, *others = out.splitlines()[1].split(",")[1:]
    assert code == 0 and 0 <= float(clean) <= 100 and others == [""] * 4


def test_no_runs_is_one_line(program):
    code, out, err = program("table", "--format", "csv")
    assert (code, out) == (2, "") and err.startswith("error: table: no runs; ")
    code, _, err = program("table", "nowhere")
    assert code == 65 and err.startswith("error: nowhere: holds no finished run")
