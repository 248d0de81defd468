"""Self-Filter: the score net's loss and training, the heap against a full re-sort, the method."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from llava.errors import UsageError
from selection.methods import self_filter
from selection.methods.self_filter import (
    SelfFilter,
    Settings,
    nearly_used,
    selection_order,
    train_net,
    weighted_loss,
)
from selection.rules.budget import top_k


def unit_rows(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_weighted_loss_by_hand():
    logits, nll, tokens = [0.5, -1.0, 2.0], [3.0, 8.0, 1.0], [2, 5, 1]
    total = sum(math.exp(x) for x in logits)
    slow = sum(3 * math.exp(x) / total * c for x, c in zip(logits, nll, strict=True)) / 8
    found = weighted_loss(torch.tensor(logits), torch.tensor(nll), torch.tensor(tokens))
    assert found.item() == pytest.approx(slow)


def test_training_gives_low_weight_to_large_losses():
    """The losses follow one direction of the features: W learns its negative."""
    rng = np.random.default_rng(0)
    features = torch.from_numpy(unit_rows(rng.normal(size=(512, 8)))).float()
    nll = 5 + 4 * features[:, 2].numpy().astype(np.float64)
    orders = [rng.permutation(512) for _ in range(20)]
    weight = train_net(lambda rows: features[rows], nll, np.ones(512), orders, 64, 0.01)
    assert weight.argmin() == 2 and -weight[2] > 2 * weight.abs()[[0, 1, 3, 4, 5, 6, 7]].max()


def test_one_step_follows_the_gradient():
    """Adam's first step is -lr times the sign; gradient of softmax-weighted losses by hand."""
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, -0.5]])
    nll = np.array([1.0, 4.0, 2.0])
    p, mean = 1 / 3, nll.mean()
    gradient = sum(p * (c - mean) * x.numpy() for c, x in zip(nll, features, strict=True))
    orders = [np.arange(3)]
    weight = train_net(lambda rows: features[rows], nll, np.ones(3), orders, 3, 0.1)
    np.testing.assert_allclose(weight, -0.1 * np.sign(gradient), rtol=1e-4)


def slow_order(difficulty, vectors, n, n_penalised, gamma):
    """The released loop: sort everything, take the first, sort the others by similarity."""
    current = {i: float(d) for i, d in enumerate(difficulty) if not math.isnan(d)}
    order = []
    for _ in range(min(n, len(current))):
        best = max(current, key=lambda i: (current[i], -i))
        taken = current.pop(best)
        order.append(best)
        near = sorted(current, key=lambda j: (-float(vectors[best] @ vectors[j]), j))
        for j in near[:n_penalised]:
            current[j] -= taken * float(vectors[best] @ vectors[j]) ** 2 * gamma
    return order, current


def lists(vectors, k, every):
    """The k nearest others of every row, and how to make those lists anew: of the row alone, or of
    `every` row that is left."""
    products = vectors @ vectors.T
    np.fill_diagonal(products, -np.inf)

    def of(rows, left):
        cosines = np.where(left, products[rows], -np.inf)
        ids = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        cosines = np.take_along_axis(cosines, ids, axis=1)
        return np.where(np.isfinite(cosines), ids, -1), cosines

    def renew(row, left, difficulty):
        rows = np.array([row, *np.flatnonzero(left)]) if every else np.array([row])
        return rows, *of(rows, left)

    return *of(np.arange(len(vectors)), np.ones(len(vectors), bool)), renew


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("listed", [4, 9, 39])
@pytest.mark.parametrize("seed", range(3))
def test_the_heap_takes_what_a_full_resort_takes(listed, seed, every):
    rng = np.random.default_rng(seed)
    vectors = unit_rows(rng.normal(size=(40, 5)))
    difficulty = rng.normal(size=40).round(1)  # ties, and both signs
    difficulty[[3, 8]] = np.nan
    for n in (1, 20, 38, 99):
        ids, cosines, renew = lists(vectors, listed, every)
        order, after, n_renewals = selection_order(difficulty, ids, cosines, n, 4, 0.7, renew)
        slow, left = slow_order(difficulty, vectors, n, 4, 0.7)
        assert order.tolist() == slow
        np.testing.assert_allclose(after[list(left)], list(left.values()), atol=1e-12)
        assert n > 1 or listed > 4 or n_renewals <= 1
        assert n < 38 or n_renewals > 0


def test_lists_that_are_nearly_used_up_are_renewed_with_one_that_is(monkeypatch):
    monkeypatch.setattr(self_filter, "_RENEWED", 3)
    left = np.ones(12, bool)
    left[[0, 1, 2, 3]] = False
    used = [1, 2, 3, 4]
    ids = np.array([used] * 12)
    ids[7] = [1, 8, 9, 10]  # three of four are left
    ids[8] = [1, 2, 3, -1]  # all there are
    cells = np.where(np.arange(12) == 11, 1, 0)
    difficulty = np.arange(12.0)
    assert nearly_used(0, cells, ids, left, difficulty).tolist() == [0, 10, 9]


def run(world, k=45, **settings):
    method = SelfFilter(Settings(**settings))
    return method.run(replace(world.context(), k=k), 0, None)


def features_of(world):
    clip = world.others["clip"]
    return unit_rows(
        np.hstack([clip[c].astype(np.float64) for c in ("image_features", "text_features")])
    )


@pytest.mark.parametrize("difficulty", ["net", "loss"])
def test_the_method_is_the_slow_loop_over_its_difficulties(world, difficulty):
    scored = run(world, difficulty=difficulty, net_lr=0.01)
    hard = scored.artefacts["difficulty"]
    if difficulty == "loss":
        np.testing.assert_allclose(hard, world.forward["nll_sum"] / world.forward["n_tokens"])
    slow, left = slow_order(hard, features_of(world), 45, 10, 1.0)
    rest = sorted(left, key=lambda row: (-left[row], row))
    assert np.argsort(-scored.scores).tolist() == slow + rest
    assert top_k(scored.scores, 45).rows.tolist() == sorted(slow)


@pytest.mark.parametrize("renewed", [1, 5, 1024])
def test_used_up_lists_do_not_change_the_choice(world, renewed, monkeypatch):
    monkeypatch.setattr(self_filter, "LISTED", 12)
    monkeypatch.setattr(self_filter, "_RENEWED", renewed)
    scored = run(world, 120, net_lr=0.01)
    slow, _ = slow_order(scored.artefacts["difficulty"], features_of(world), 120, 10, 1.0)
    assert np.argsort(-scored.scores)[:120].tolist() == slow
    (note,) = scored.notes
    assert int(note.split("again ")[1].split()[0]) > 0


def test_difficulty_is_minus_the_net_on_unit_features(world):
    """Samples whose features agree have the same difficulty; scale does not matter."""
    clip = world.others["clip"]
    for column in ("image_features", "text_features"):
        clip[column][7] = clip[column][9]
        clip[column][8] = clip[column][9] * 2
    hard = run(world).artefacts["difficulty"]
    assert hard[7] == hard[9] == pytest.approx(hard[8], rel=1e-5)
    assert len(np.unique(hard)) > 100


def test_a_sample_that_one_model_cannot_score_is_never_chosen(world):
    world.forward["nll_sum"][4] = np.nan
    scores = run(world, 149).scores
    assert np.flatnonzero(np.isnan(scores)).tolist() == [4]


def test_equal_difficulties_without_penalty_go_by_position(world):
    world.forward["nll_sum"][:], world.forward["n_tokens"][:] = 2, 4
    scores = run(world, difficulty="loss", gamma=0.0).scores
    assert top_k(scores, 20).rows.tolist() == list(range(20))


def test_fewer_samples_than_neighbours(new_world):
    assert sorted(run(new_world("tiny", n=4), 2).scores) == [-4, -3, -2, -1]


@pytest.mark.parametrize(
    "wrong",
    [{"n_penalised": 65}, {"gamma": -1}, {"net_epochs": 0}, {"net_batch": 0}, {"n_probe": -1}],
)
def test_impossible_settings(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Settings(**wrong)
