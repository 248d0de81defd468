"""ARDS: every equation against a slow loop, every setting, and the pools that break it."""

import itertools
import math

import numpy as np
import pytest
import torch

from llava.errors import DataError, UsageError
from selection.methods.ards import (
    Ards,
    Settings,
    attack_keys,
    direction,
    information,
    similarity,
    subgroup_weights,
    worst_case,
)
from selection.signals.perturbed import KIND_CHOICE, Perturbed


def subgroups_of(scored):
    return scored.artefacts["subgroups"]


def run(world, seed=0, **settings):
    return world.run(Ards(Settings(**settings)), seed)


# ------------------------------------------------------------------------------ equations


def test_worst_case_equals_a_slow_loop():
    rng = np.random.default_rng(0)
    for _ in range(200):
        keys = rng.integers(0, 5, size=rng.integers(1, 30)).astype(float)
        keys[rng.random(len(keys)) < 0.2] = np.nan
        size = int(rng.integers(1, 12))
        slow, left = [], [i for i in range(len(keys)) if not math.isnan(keys[i])]
        while left and len(slow) < size:
            best = max(left, key=lambda i: (keys[i], -i))  # ties: the earlier position
            slow.append(best)
            left.remove(best)
        assert worst_case(keys, size).tolist() == slow


def test_attack_keys_by_loss_gap_are_the_gaps():
    gap = np.array([0.5, np.nan, 2.0, np.inf], np.float32)
    keys = attack_keys(gap, np.array([True, False, False, True]), np.zeros(4), "loss_gap")
    np.testing.assert_array_equal(keys, [0.5, np.nan, 2.0, np.nan])


def test_attack_keys_by_failure_ask_only_whether_some_order_failed():
    gap = np.array([0.5, 9.0, 2.0, np.nan], np.float32)
    is_choice = np.array([True, True, False, False])
    keys = attack_keys(gap, is_choice, np.array([3, 0, 0, 0]), "failure")
    np.testing.assert_array_equal(keys, [np.inf, np.nan, 2.0, np.nan])


def test_weights_are_a_softmax():
    losses = np.array([0.3, 2.0, 1.1])
    total = sum(math.exp(loss) for loss in losses)
    np.testing.assert_allclose(subgroup_weights(losses), [math.exp(x) / total for x in losses])
    np.testing.assert_allclose(subgroup_weights(losses + 1000), subgroup_weights(losses))
    assert subgroup_weights(np.array([7.0])).tolist() == [1.0]


@pytest.fixture(scope="module")
def toy():
    """Rows, members of three subgroups of 4, 1 and 6 vectors, and weights."""
    rng = np.random.default_rng(3)
    members = [rng.normal(size=(b, 10)) for b in (4, 1, 6)]
    return rng.normal(size=(9, 10)), members, np.array([0.2, 0.5, 0.3])


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def slow_information(rows, members, weights, kind, aggregate):
    """The slides' formulas, one number at a time."""
    scores = []
    for row in rows:
        d = []
        for group in members:
            cosines = [cosine(row, vector) for vector in group]
            d.append(max(cosines) if kind == "max" else sum(cosines) / len(cosines))
        total = sum(w * x for w, x in zip(weights, d, strict=True))
        scores.append(max(d) if aggregate == "max" else total)
    return np.array(scores)


@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize("aggregate", ["weighted_sum", "max"])
def test_similarity_and_information_equal_a_slow_loop(toy, kind, aggregate):
    rows, members, weights = toy
    cosines = np.array([[cosine(row, v) for group in members for v in group] for row in rows])
    fast = information(similarity(cosines, np.array([0, 4, 5]), kind), weights, aggregate)
    np.testing.assert_allclose(fast, slow_information(rows, members, weights, kind, aggregate))


def test_direction_is_the_identity_behind_the_single_product(toy):
    rows, members, weights = toy
    units = [torch.from_numpy(g / np.linalg.norm(g, axis=1, keepdims=True)) for g in members]
    v = direction(units, weights).numpy()
    fast = rows @ v / np.linalg.norm(rows, axis=1)
    slow = slow_information(rows, members, weights, "mean", "weighted_sum")
    np.testing.assert_allclose(fast, slow, atol=1e-7)  # v is float32


# --------------------------------------------------------------------------- whole method


def vectors_of(arrays, vector, normalize_parts):
    names = ["last_state", "attention_state"] if vector == "attention" else ["last_state"]
    parts = [arrays[name].astype(np.float64) for name in names]
    if normalize_parts:
        parts = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    return np.hstack(parts)


@pytest.mark.parametrize(
    ("vector", "normalize", "kind", "aggregate", "clustering"),
    [
        *itertools.product(
            ["attention", "last_token"], [False, True], ["mean", "max"], ["weighted_sum"], [True]
        ),
        ("attention", False, "mean", "max", True),
        ("attention", False, "max", "max", True),
        ("attention", False, "mean", "weighted_sum", False),
    ],
)
def test_scores_equal_the_formulas_over_the_reported_subgroups(
    world, vector, normalize, kind, aggregate, clustering
):
    settings = {"n_clusters": 3, "subgroup_size": 4, "clustering": clustering}
    scored = run(
        world,
        vector=vector,
        normalize_parts=normalize,
        similarity=kind,
        aggregate=aggregate,
        **settings,
    )
    clean = vectors_of(world.forward, vector, normalize)
    copies = vectors_of(world.perturbed, vector, normalize)
    members, losses = [], []
    for group in subgroups_of(scored):
        rows, perturbed = group["rows"], group["perturbed_rows"]
        members.append([*clean[rows], *copies[perturbed]])
        both = [*world.forward["nll_mean"][rows], *world.perturbed["loss_perturbed"][perturbed]]
        losses.append(sum(map(float, both)) / len(both))
        assert group["loss"] == pytest.approx(losses[-1])
    weights = [math.exp(loss) / sum(map(math.exp, losses)) for loss in losses]
    assert [group["weight"] for group in subgroups_of(scored)] == pytest.approx(weights)
    slow = slow_information(clean, members, weights, kind, aggregate)
    np.testing.assert_allclose(scored.scores, slow, atol=1e-6)  # float32 sums of 24 products


def test_members_are_the_worst_of_the_candidates_of_their_cluster(world):
    scored = run(world, n_clusters=3, subgroup_size=4, candidates=9)
    labels = scored.artefacts["cluster_labels"]
    (requested,) = world.requested
    assert len(scored.artefacts["centroids"]) == 9  # three formats that can be perturbed
    seen = set()
    for group in subgroups_of(scored):
        label = set(labels[group["rows"]])
        assert len(label) == 1 and not label & seen
        seen |= label
        mine = np.flatnonzero(labels == label.pop())
        assert group["n_samples"] == len(mine)
        candidates = np.intersect1d(mine, requested)
        assert len(candidates) == group["n_candidates"] == min(9, len(mine))
        gaps = world.perturbed["gap"]
        best = sorted(candidates, key=lambda row: -gaps[row])[:4]
        assert group["rows"] == best and group["keys"] == gaps[best].tolist()
        choice = [row for row in best if world.formats[row] == "choice"]
        assert group["perturbed_rows"] == choice
        assert group["name"].rpartition("_")[0] == world.formats[best[0]]


def test_candidates_zero_perturbs_everything_that_can_be(world):
    run(world, candidates=0, min_cluster_size=1)
    assert world.requested[0].tolist() == np.flatnonzero(world.formats != "plain_text").tolist()


def test_clusters_stay_inside_a_format_unless_the_pool_is_clustered_whole(world):
    def formats_per_cluster(scope):
        labels = run(world, clustering_scope=scope, n_clusters=2).artefacts["cluster_labels"]
        return [set(world.formats[labels == label]) for label in range(labels.max() + 1)]

    assert all(len(found) == 1 for found in formats_per_cluster("format"))
    assert len(formats_per_cluster("format")) == 6
    pool = formats_per_cluster("pool")
    assert len(pool) == 2 and any(len(found) > 1 for found in pool)


def test_plain_text_is_in_no_subgroup_but_scored(world):
    scored = run(world)
    plain = np.flatnonzero(world.formats == "plain_text")
    assert not set(plain) & {row for group in subgroups_of(scored) for row in group["rows"]}
    assert np.isfinite(scored.scores[plain]).all()
    assert (scored.artefacts["cluster_labels"][plain] == -1).all()


def test_without_clustering_one_subgroup_of_the_largest_gaps_of_the_pool(world):
    scored = run(world, clustering=False, n_clusters=2, subgroup_size=5, candidates=0)
    (group,) = subgroups_of(scored)
    gaps = np.where(np.isnan(world.perturbed["gap"]), -1, world.perturbed["gap"])
    assert group["rows"] == np.argsort(-gaps)[: 3 * 2 * 5].tolist()  # M = 3 formats x 2 clusters
    assert group["weight"] == 1


def test_without_perturbation_nothing_is_requested_and_members_are_random(world):
    first, second = (run(world, seed, perturbation=False, subgroup_size=3) for seed in (0, 1))
    assert world.requested == []
    rows = [[group["rows"] for group in subgroups_of(scored)] for scored in (first, second)]
    assert rows[0] != rows[1]
    assert {len(members) for members in rows[0]} <= {2, 3}
    assert all(group["perturbed_rows"] == [] for group in subgroups_of(first))


def test_random_subgroup_without_clustering_has_the_same_size(world):
    kept = {"clustering": False, "n_clusters": 2, "subgroup_size": 5, "candidates": 20}
    sizes = [
        len(subgroups_of(run(world, perturbation=on, **kept))[0]["rows"]) for on in (True, False)
    ]
    assert sizes == [30, 30]


def test_failure_takes_multiple_choice_by_wrong_answers_and_the_rest_by_gap(world):
    scored = run(world, mcq_criterion="failure", n_clusters=1, subgroup_size=10, candidates=0)
    by_name = {group["name"]: group["rows"] for group in subgroups_of(scored)}
    assert (world.perturbed["n_failed"][by_name["choice_0"]] > 0).all()
    gaps = world.perturbed["gap"]
    phrase = np.flatnonzero(world.formats == "phrase")
    assert by_name["phrase_0"] == phrase[np.argsort(-gaps[phrase])][:10].tolist()


def test_perturbed_copies_join_only_when_asked(world):
    with_copies, without = (run(world, include_perturbed=join) for join in (True, False))
    assert any(group["perturbed_rows"] for group in subgroups_of(with_copies))
    assert not any(group["perturbed_rows"] for group in subgroups_of(without))
    assert not np.allclose(with_copies.scores, without.scores)


def test_excluded_members_cannot_be_selected_and_change_no_other_score(world):
    kept, excluded = (run(world, exclude_subgroups=out, subgroup_size=5) for out in (False, True))
    members = sorted(row for group in subgroups_of(excluded) for row in group["rows"])
    assert np.flatnonzero(np.isnan(excluded.scores)).tolist() == members
    others = np.setdiff1d(np.arange(len(world.pool)), members)
    np.testing.assert_array_equal(kept.scores[others], excluded.scores[others])


def test_settings_reach_the_perturbed_signal(world):
    method = Ards(Settings(symbols="snvf", max_orders=6, diffusion_step=500))
    plan = method.second_stage(world.context(), np.random.default_rng(0))
    assert plan.requests["perturbed"].signal == Perturbed("snvf", 6, diffusion_step=500)
    assert (np.diff(plan.requests["perturbed"].rows) > 0).all()


# ------------------------------------------------------------------------------ edge cases


def test_a_pool_of_text_says_what_to_do_and_random_subgroups_do_it(new_world):
    world = new_world("text", formats=("plain_text",), n=40)
    with pytest.raises(DataError, match="--perturbation false"):
        run(world)
    scored = run(world, perturbation=False)
    assert np.isfinite(scored.scores).all()
    assert {group["name"][:10] for group in subgroups_of(scored)} == {"plain_text"}


def test_text_that_is_multiple_choice_makes_a_subgroup(new_world):
    world = new_world("quiz", formats=("choice",), n=40)
    world.pool.has_image = np.zeros(40, bool)
    assert {group["name"][:6] for group in subgroups_of(run(world))} == {"choice"}


def test_no_candidate_that_can_be_perturbed_says_what_to_do(world):
    world.perturbed["gap"][:] = np.nan
    with pytest.raises(DataError, match="none of .. candidates changed.*--perturbation false"):
        run(world)


def test_a_cluster_where_nothing_can_be_perturbed_makes_no_subgroup(world):
    world.perturbed["gap"][world.formats == "caption"] = np.nan
    scored = run(world, n_clusters=1)
    assert [group["name"] for group in subgroups_of(scored)] == ["phrase_0", "choice_0"]
    assert any("nothing to perturb" in note for note in scored.notes)


def test_clusters_that_are_too_small_are_refused_with_the_settings_to_change(world):
    with pytest.raises(DataError, match="--min_cluster_size 1000"):
        run(world, min_cluster_size=1000)


def test_a_format_with_fewer_samples_than_clusters(new_world):
    world = new_world("few", n=12)
    scored = run(world, n_clusters=10, min_cluster_size=1)
    assert np.isfinite(scored.scores).all()
    assert any("fewer members" in note for note in scored.notes)


def test_infinite_or_missing_loss_is_neither_candidate_nor_scored(world):
    lost = [int(np.flatnonzero(world.formats == "phrase")[0]), 40]
    world.forward["nll_mean"][lost] = [np.inf, np.nan]
    scored = run(world, candidates=0)
    assert np.flatnonzero(np.isnan(scored.scores)).tolist() == sorted(lost)
    assert not set(lost) & set(world.requested[0].tolist())


def test_a_candidate_that_was_quarantined_when_perturbed_is_scored_but_no_member(world):
    row = subgroups_of(run(world))[0]["rows"][0]
    perturbed = dict(world.perturbed)
    for name in ("gap", "loss_perturbed"):
        perturbed[name] = world.perturbed[name].copy()
        perturbed[name][row] = np.nan
    world.perturbed = perturbed
    world.folder = world.folder / "again"
    scored = run(world)
    assert row not in {r for group in subgroups_of(scored) for r in group["rows"]}
    assert np.isfinite(scored.scores[row])


def test_copies_of_a_sample_score_alike(world):
    """Same record, same vectors: the score is a function of the vector, to the last bit or two."""
    for arrays in (world.forward, world.perturbed):
        for array in arrays.values():
            array[[3, 80, 149]] = array[3]
    scores = run(world, seed=1).scores
    np.testing.assert_allclose(scores[[80, 149]], scores[3], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_clusters": 0}, "--n_clusters 0"),
        ({"subgroup_size": 0}, "--subgroup_size 0"),
        ({"candidates": 10}, "--candidates 10.*--subgroup_size"),
        ({"candidates": -1}, "--candidates -1"),
        ({"diffusion_step": 1000}, "--diffusion_step 1000"),
    ],
)
def test_contradictory_settings_are_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        Settings(**settings)


def test_kinds_are_those_of_the_signal(world):
    assert set(world.perturbed["kind"][world.formats == "choice"]) == {KIND_CHOICE}
