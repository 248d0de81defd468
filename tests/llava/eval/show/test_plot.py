"""The pictures: what is drawn is what the runs say."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from llava.errors import UsageError
from llava.eval.__main__ import main
from llava.eval.show.plot import attacked, draw, positions, shares
from llava.eval.show.runs import read_runs


@pytest.fixture(scope="module")
def runs(asked):
    return read_runs([asked("seed"), asked("pope"), asked("seed", "twin")])


def test_both_pictures_are_written_the_same_twice(asked, tmp_path, capsys):
    for name in ("a", "b"):
        main(["plot", str(asked("seed")), "--out", str(tmp_path / name), "--reading", "logit"])
    assert capsys.readouterr().out.split() == [
        str(tmp_path / folder / f"{name}.png")
        for folder in ("a", "b")
        for name in ("attacked", "positions")
    ]
    for name in ("attacked.png", "positions.png"):
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("a", "b"))
        assert first == second
        with Image.open(tmp_path / "a" / name) as picture:
            assert min(picture.size) > 200 and len(set(picture.convert("RGB").getdata())) > 10


def test_points_are_the_numbers_with_their_intervals(runs):
    figure = attacked([runs[0]], "logit")
    block = runs[0].block("logit")
    for panel, attack in zip(figure.axes, ("pa", "sa", "sa_pa"), strict=True):
        (bars,) = panel.containers
        point, _, (across, up) = bars.lines
        assert point.get_xydata().tolist() == [[block["clean"], block[attack]]]
        assert np.allclose(across.get_segments()[0][:, 0], block["intervals"]["clean"])
        assert np.allclose(up.get_segments()[0][:, 1], block["intervals"][attack])
        assert panel.get_xlim() == panel.get_ylim()


@pytest.mark.parametrize("reading", ["exact", "logit"])
def test_bars_are_shares_of_all_answers(runs, reading):
    """Under `exact` the random model names no symbol: all answers are in the last bar."""
    figure = positions([run for run in runs if run.attacked], reading)
    assert [axis.get_title() for axis in figure.axes] == ["SEED-Bench, ABCD", "SEED-Bench, QWER"]
    for axis, name in zip(figure.axes, ("clean", "sa"), strict=True):
        orders = runs[0].block(reading)["orders"][name]
        assert len(axis.containers) == 2  # models
        heights = [bar.get_height() for bar in axis.containers[0]]
        assert sum(heights) == pytest.approx(100)
        assert heights[-1] == orders["parse_failures"]
        if reading == "logit":
            n = sum(orders["chosen"])
            assert heights == pytest.approx([*(100 * k / n for k in orders["chosen"]), 0])
        (lines,) = axis.collections
        assert [segment[0, 1] for segment in lines.get_segments()] == [25, 25, 25, 25]


def test_shares_of_answers_of_which_a_fifth_was_not_read():
    assert shares({"chosen": [3, 1], "parse_failures": 20.0}) == [60, 20, 20]


def test_positions_are_not_drawn_of_the_hard_orders(asked, tmp_path):
    runs = read_runs([asked("seed", orders="until_failure")])
    assert [path.name for path in draw(runs, "exact", tmp_path)] == ["attacked.png"]


def test_nothing_to_draw(asked, tmp_path):
    for folder in (asked("pope"), asked("seed", attacks="clean")):
        with pytest.raises(UsageError, match="no run of a benchmark under attack"):
            draw(read_runs([folder]), "exact", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_summaries_say_how_often_the_right_option_stood_where(asked):
    summary = json.loads((asked("seed") / "summary.json").read_bytes())
    assert summary["readings"]["exact"]["counted"]["orders"]["clean"]["right"] == [18] * 4
