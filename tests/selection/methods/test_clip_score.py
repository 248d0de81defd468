"""CLIP-Score: the cosines as they are, and text-only samples dropped or kept in proportion."""

import numpy as np

from selection.methods.clip_score import ClipScore, Settings, within_groups
from selection.rules.budget import top_k

PROPORTIONAL = Settings(text_only="proportional")


def test_the_score_is_the_cosine_and_text_has_none(world):
    scores = world.run(ClipScore()).scores
    np.testing.assert_array_equal(scores, world.others["clip"]["clip_score"])
    assert (np.isnan(scores) == (world.formats == "plain_text")).all()


def test_places_in_groups_by_a_slow_loop():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 9, 60).astype(float)
    scores[rng.random(60) < 0.2] = np.nan
    groups = rng.integers(0, 3, 60)
    found = within_groups(scores, groups)
    for i in range(60):
        mine = [j for j in range(60) if groups[j] == groups[i] and not np.isnan(scores[j])]
        below = sum(scores[j] < scores[i] or (scores[j] == scores[i] and j < i) for j in mine)
        slow = np.nan if np.isnan(scores[i]) else (below + 0.5) / len(mine)
        np.testing.assert_equal(found[i], slow)


def test_proportional_takes_the_same_share_of_both_and_the_best_of_the_images(world):
    scores = world.run(ClipScore(PROPORTIONAL)).scores
    plain = world.formats == "plain_text"
    cosines = world.others["clip"]["clip_score"]
    for k in (1, 30, 75, 149):
        rows = top_k(scores, k).rows
        n_images = int((~plain[rows]).sum())
        assert abs(n_images - k * (~plain).mean()) <= 1
        best = sorted(np.flatnonzero(~plain), key=lambda row: -cosines[row])[:n_images]
        assert sorted(best) == [row for row in rows if not plain[row]]


def test_text_is_drawn_at_random_by_content(world, tmp_path):
    order = np.random.default_rng(1).permutation(150)
    moved = world.reordered(tmp_path / "moved", order)
    scores, again = (each.run(ClipScore(PROPORTIONAL), seed=4).scores for each in (world, moved))
    np.testing.assert_array_equal(again, scores[order])
    other = world.run(ClipScore(PROPORTIONAL), seed=5).scores
    plain = world.formats == "plain_text"
    assert (scores[~plain] == other[~plain]).all() and (scores[plain] != other[plain]).any()


def test_bad_samples_have_no_score_either_way(world):
    world.bad = np.flatnonzero(world.formats == "plain_text")[:2].tolist() + [0]
    for settings in (Settings(), PROPORTIONAL):
        assert np.isnan(world.run(ClipScore(settings)).scores[world.bad]).all()
