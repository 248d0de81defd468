"""Base of methods: random keys that follow the sample, streams by name, checks of the scores."""

import json
import sys

import numpy as np
import pytest
from scipy import stats

from llava.errors import NonFiniteError, UsageError
from selection.methods import find_methods, get_method
from selection.methods.base import Context, Method, Request, Scored, SecondStage, stream
from selection.pool.pool import Pool
from selection.signals.perturbed import Perturbed


def pool_of(path, texts):
    records = [{"id": 1, "conversations": [{"from": "human", "value": text}]} for text in texts]
    path.write_text(json.dumps(records))
    return Pool.open(path)


class Fixed(Method):
    """Returns the scores it was made with."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def score(self, context, rng):
        return Scored(np.array(self.scores, dtype=np.float64))


def test_keys_are_uniform_and_independent_between_draws(tmp_path):
    context = Context(pool_of(tmp_path / "p.json", [str(i) for i in range(5000)]))
    rng = stream(0, "x")
    a, b = context.keys(rng), context.keys(rng)
    assert (a >= 0).all() and (a < 1).all() and len(np.unique(a)) == 5000
    assert stats.kstest(a, "uniform").pvalue > 1e-3
    assert abs(stats.pearsonr(a, b).statistic) < 0.06  # 4 standard deviations


def test_keys_follow_the_sample_not_its_place(tmp_path):
    texts = np.array([str(i) for i in range(300)])
    order = np.random.default_rng(0).permutation(300)
    plain = Context(pool_of(tmp_path / "a.json", texts)).keys(stream(5))
    moved = Context(pool_of(tmp_path / "b.json", texts[order])).keys(stream(5))
    assert (plain[order] == moved).all()


def test_copies_of_a_sample_get_keys_of_their_own(tmp_path):
    pool = pool_of(tmp_path / "p.json", ["same"] * 50 + ["other"] + ["same"] * 50)
    keys = Context(pool).keys(stream(1))
    assert len(np.unique(keys)) == 101
    alone = Context(pool_of(tmp_path / "q.json", ["other", "same"])).keys(stream(1))
    assert keys[50] == alone[0] and keys[0] == alone[1]


def test_streams_depend_on_seed_and_every_name():
    draws = {
        stream(*key).integers(2**62)
        for key in [(0, "ards"), (1, "ards"), (0, "ards", "plan"), (0, "ards", "score"), (0, "x")]
    }
    assert len(draws) == 5
    assert stream(3, "a", "b").random() == stream(3, "a", "b").random()


def test_values_by_pool_row_with_nan_for_bad_rows(world):
    world.bad = [4, 30]
    values = world.context(block_size=7).values("forward", "nll_mean")
    assert np.flatnonzero(np.isnan(values)).tolist() == [4, 30]
    good = ~np.isnan(values)
    np.testing.assert_array_equal(values[good], world.forward["nll_mean"][good])


def test_run_hands_the_plan_and_its_signals_to_score(world):
    class TwoStage(Method):
        def second_stage(self, context, rng):
            return SecondStage({"perturbed": Request(Perturbed(), np.array([3, 5]))}, state="mine")

        def score(self, context, rng):
            assert context.stage.state == "mine"
            return Scored(context.values("perturbed", "gap"))

    scores = world.run(TwoStage()).scores
    assert np.flatnonzero(~np.isnan(scores)).tolist() == [3, 5]
    assert [rows.tolist() for rows in world.requested] == [[3, 5]]


def test_a_method_without_requests_extracts_nothing(world):
    world.run(Fixed(np.zeros(len(world.pool))))
    assert world.requested == []


def test_infinite_scores_stop_with_the_row(world):
    scores = np.zeros(len(world.pool))
    scores[17] = np.inf
    with pytest.raises(NonFiniteError, match="row 17"):
        world.run(Fixed(scores))


def test_scores_of_another_length_are_a_bug(world):
    with pytest.raises(TypeError, match=r"\(3,\)"):
        world.run(Fixed([1.0, 2.0, 3.0]))


def test_records_that_violate_the_schema_are_never_scored(tmp_path):
    records = [{"id": i, "conversations": [{"from": "human", "value": "hi"}]} for i in range(4)]
    records[2] = {"id": 2, "conversations": "none"}
    (tmp_path / "p.json").write_text(json.dumps(records))
    context = Context(Pool.open(tmp_path / "p.json"))
    scored = Fixed(np.ones(4)).run(context, 0, lambda requests: {})
    assert np.isnan(scored.scores).tolist() == [False, False, True, False]


def test_the_best_are_taken_and_ties_go_to_the_earlier_row(world):
    scores = np.zeros(len(world.pool))
    scores[[9, 90]] = 1
    rows = Fixed(scores).select(world.context(), scores, 4)
    assert rows.tolist() == [0, 1, 9, 90]


def test_methods_are_found_by_their_file():
    methods = find_methods()
    assert {"ards", "random", "random_stratified"} <= set(methods)
    assert list(methods) == sorted(methods)
    for name, method in methods.items():
        assert method.name == name and sys.modules[f"selection.methods.{name}"]
        assert get_method(name) is method


@pytest.mark.parametrize(("typed", "meant"), [("adrs", "ards"), ("random_strat", "random_strat")])
def test_an_unknown_method_gets_the_nearest_name(typed, meant):
    with pytest.raises(UsageError, match=f"did you mean '{meant}"):
        get_method(typed)


def test_a_hopeless_name_gets_the_list():
    with pytest.raises(UsageError, match="methods are .*random"):
        get_method("zzzzzz")
