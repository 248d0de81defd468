"""What runs are called when they stand side by side, and which cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llava.errors import DataError, UsageError
from llava.eval.show.runs import Run, read_runs
from llava.eval.show.table import join
from llava.eval.tasks import Task


def names(*folders):
    return [run.model for run in read_runs(folders)]


def test_a_model_is_called_by_its_folder(asked):
    assert names(asked("seed"), asked("pope"), asked("seed", "twin")) == ["m", "m", "twin"]


def test_two_models_in_folders_of_one_name_are_called_by_their_paths(asked):
    one, two = names(asked("seed"), asked("pope", "two/m"))
    assert one.endswith("models/one/m") and two.endswith("models/two/m")


def test_symbols_are_named_where_runs_differ_in_them(asked):
    other = asked("seed", symbols="snvf")
    assert names(asked("seed"), other, asked("pope")) == ["m (qwer)", "m (snvf)", "m"]
    assert names(other, asked("pope")) == ["m", "m"]
    assert names(asked("seed"), asked("seed", symbols="1234"))[1] == "m (1234)"


def test_two_runs_of_one_model_and_benchmark(asked):
    with pytest.raises(UsageError, match="are both seed of m; give one"):
        read_runs([asked("seed"), asked("seed", engine="naive")])


def test_a_run_that_is_not_finished(asked, tmp_path):
    (tmp_path / "summary.json").write_bytes((asked("seed") / "summary.json").read_bytes())
    with pytest.raises(DataError, match="holds no finished run"):
        read_runs([tmp_path])


def test_a_benchmark_that_is_not_here_is_called_by_its_name_and_stands_last():
    summary = {"benchmark": "toy", "published": {"accuracy": 60.0, "other": 50.0}}
    run = Run(None, "m", "m", "", summary)
    assert (run.task.title, run.task.place) == ("toy", Task.place)
    table = join([run, replace(run, summary=summary | {"benchmark": "mme"})], "exact")
    assert [group.title for group in table.groups] == ["MME", "toy"]
    assert table.rows["m"]["toy", "accuracy"] == 60.0 and ("toy", "other") not in table.rows["m"]


def test_published_is_the_first_metric_and_every_split_of_gqa_ood():
    splits = {"original": 60.0, "all": 50.0, "head": 56.0, "tail": 34.0}
    for benchmark, headline in (("gqa_ood", splits | {"avg": 50.0}), ("gqa", {"original": 60.0})):
        summary = {"benchmark": benchmark, "published": splits}
        assert Run(None, "m", "m", "", summary).task.headline(splits) == headline
