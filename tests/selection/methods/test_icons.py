"""ICONS, LESS and RDS on made-up signals: influences against slow loops, and what they report."""

from dataclasses import replace

import numpy as np
import pytest

from llava.errors import DataError, NonFiniteError, UsageError
from selection.methods.icons import Icons, Settings
from selection.methods.less import Less, weighted_sum
from selection.methods.less import Settings as LessSettings
from selection.methods.rds import Rds
from selection.rules.consensus import vote
from selection.rules.influence import by_task, direction, visual


def slow_influence(world, signal, column):
    """Mean cosine of every pool row to the samples of each sub-task."""
    pool = (world.others.get(signal) or world.forward)[column].astype(np.float64)
    wanted = [world.targets[s][signal][column].astype(np.float64) for s in ("a", "b/1", "b/2")]
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (pool, *wanted)]
    return np.array([[np.mean([row @ v for v in task]) for task in unit[1:]] for row in unit[0]])


@pytest.mark.parametrize(
    ("method", "signal", "column"),
    [(Icons(), "gradients", "gradient"), (Rds(), "forward", "last_state")],
)
def test_influence_is_the_mean_cosine(world, method, signal, column):
    slow = slow_influence(world, signal, column)
    expected = np.stack([slow[:, 0], slow[:, 1:].mean(axis=1)], axis=1)  # equal sizes
    scored = world.run(method)
    # Stored unit vectors are of half precision: 2^-11 of a length, and their cosines.
    np.testing.assert_allclose(scored.artefacts["influence"], expected, atol=5e-4)
    found = scored.artefacts["influence"]
    np.testing.assert_array_equal(scored.scores, vote(found, np.ones(2), 45 / 150))


def test_sub_tasks_by_their_largest(world):
    slow = slow_influence(world, "gradients", "gradient")
    scored = world.run(Icons(Settings(subtasks="max")))
    expected = np.stack([slow[:, 0], slow[:, 1:].max(axis=1)], axis=1)
    np.testing.assert_allclose(scored.artefacts["influence"], expected, atol=5e-4)
    assert Icons.presets["as_released"] == {"subtasks": "max"}


def test_less_is_the_largest_over_all_sub_tasks(world):
    slow = slow_influence(world, "gradients", "gradient")
    scored = world.run(Less())
    np.testing.assert_allclose(scored.scores, slow.max(axis=1), atol=5e-4)
    assert [task["name"] for task in scored.artefacts["tasks"]] == ["a", "b/b/1", "b/b/2"]


def test_unequal_sub_tasks_count_by_their_samples():
    influence = np.array([[1.0, 2.0, 5.0]])
    counts = [np.array([4]), np.array([3, 1])]
    np.testing.assert_allclose(by_task(influence, counts, "mean"), [[1, 2.75]])
    np.testing.assert_allclose(by_task(influence, counts, "max"), [[1, 5]])


def test_checkpoints_weigh_by_their_learning_rate():
    found = weighted_sum([np.array([1.0, 2.0]), np.array([5.0, 0.0])], [3e-5, 1e-5])
    np.testing.assert_allclose(found, [2, 1.5])


def test_visual_dependency_is_zero_where_the_image_changes_nothing():
    rng = np.random.default_rng(0)
    g, h, v = rng.normal(size=(6, 8)), rng.normal(size=(6, 8)), rng.normal(size=(8, 3))
    h[:2] = g[:2]
    lengths = [np.linalg.norm(x, axis=1) for x in (g, h)]
    clean, noise = (x / n[:, None] @ v for x, n in zip((g, h), lengths, strict=True))
    slow = (g - h) @ v / lengths[0][:, None]
    np.testing.assert_allclose(visual(clean, noise, *lengths), slow, atol=1e-12)
    assert (visual(clean, noise, *lengths)[:2] == 0).all()


def test_unusable_target_samples_leave_the_mean(world):
    world.bad = [0, 5]
    reader = world.tasks(16)[0].readers["gradients"][0]
    kept = np.delete(world.targets["a"]["gradients"]["gradient"].astype(np.float64), [0, 5], axis=0)
    np.testing.assert_allclose(direction(reader, "gradient", False), kept.mean(axis=0), atol=1e-6)


def test_a_task_without_a_usable_sample_is_an_error(world):
    world.bad = list(range(12))
    with pytest.raises(DataError, match="no sample of this target task"):
        world.run(Icons())


@pytest.mark.parametrize("method", [Icons(), Less(), Rds()])
def test_a_broken_number_is_never_a_missing_vote(world, method):
    for column in (world.others["gradients"]["gradient"], world.forward["last_state"]):
        column[40] = np.nan
    with pytest.raises(NonFiniteError, match="target task a: .* 1 samples"):
        world.run(method)


def test_weights_of_the_targets_are_those_of_the_vote(world):
    context = world.context()
    tasks = [replace(task, weight=w) for task, w in zip(context.tasks, (3.0, 1.0), strict=True)]
    scored = Icons().run(replace(context, tasks=tuple(tasks)), 0, None)
    table, weights = scored.artefacts["influence"], np.array([3.0, 1.0])
    np.testing.assert_array_equal(scored.scores, vote(table, weights, 45 / 150))
    assert [task["weight"] for task in scored.artefacts["tasks"]] == [3.0, 1.0]


def test_every_task_votes_for_the_share_of_the_usable_samples(world):
    """45 of the 100 that could be scored, not of 150: a task's votes are as many as the budget."""
    world.bad = list(range(20, 70))
    scored = world.run(Icons())
    left = np.setdiff1d(np.arange(150), world.bad)
    table = scored.artefacts["influence"][left]
    np.testing.assert_array_equal(scored.scores[left], vote(table, np.ones(2), 45 / 100))


def test_a_sample_without_its_noise_gradient_has_no_score(world):
    context = world.context()
    world.bad, world.folder = [7], world.folder / "noise"
    readers = {**context.readers, "noise_gradients": world.context().readers["noise_gradients"]}
    method = Icons(Settings(visual_dependency=True))
    scores = method.run(replace(context, readers=readers), 0, None).scores
    assert np.flatnonzero(np.isnan(scores)).tolist() == [7]


@pytest.mark.parametrize("method", [Icons(), Rds()])
def test_a_pool_without_a_usable_sample_is_an_error(world, method):
    tasks = world.tasks(16)
    world.bad, world.folder = list(range(150)), world.folder / "bad"
    with pytest.raises(DataError, match="no sample of the pool"):
        method.run(replace(world.context(), tasks=tasks), 0, None)


def test_the_notes_say_what_the_rule_decided(world):
    (note,) = world.run(Icons()).notes
    assert note.endswith("chosen by mean rank") and int(note.split()[0]) <= 45
    assert world.run(Icons(Settings(aggregation="merge"))).notes == ()
    world.targets["b/1"]["gradients"]["gradient"] *= -1
    world.targets["b/2"]["gradients"]["gradient"] *= -1
    world.folder = world.folder / "turned"
    notes = world.run(Icons(Settings(aggregation="merge_sumnorm"))).notes
    totals = world.run(Icons()).artefacts["influence"].sum(axis=0)
    turned = [name for name, total in zip("ab", totals, strict=True) if total < 0]
    assert turned
    assert [note.partition(" add up")[0] for note in notes] == [
        f"influences on {', '.join(turned)}"
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoints": ("a", "b")}, "--learning_rates: 0 given for 2"),
        ({"checkpoints": ("a", "b"), "learning_rates": (1e-5,)}, "1 given for 2"),
        ({"checkpoints": ("a", "b"), "learning_rates": (1e-5, 0.0)}, "must be above 0"),
        ({"learning_rates": (float("inf"),)}, "must be above 0"),
        ({"learning_rates": (1e-5, 2e-5)}, "2 given for 1"),
        ({"checkpoints": ("a",), "learning_rates": (1e-5, 2e-5)}, "2 given for 1"),
    ],
)
def test_checkpoints_without_rates_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        LessSettings(**settings)
