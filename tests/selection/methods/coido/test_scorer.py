"""Features, scorers and their training."""

import json

import numpy as np
import pytest
import torch

from llava.errors import NonFiniteError, UsageError
from selection.methods.coido.features import Assembly, scaled
from selection.methods.coido.fit import Fitter, Recipe, schedule, shuffled_batches
from selection.methods.coido.scorer import ARCHITECTURES, Scorer

N, D = 96, 8


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)
    clip = [rng.normal(size=(N, D)).astype(np.float32) for _ in range(2)]
    scores = {name: rng.normal(size=N) for name in ("llm_score", "clip_score", "image_reward")}
    scores["clip_score"][::4] = np.nan
    clip[0][::4] = 0
    return clip, scores


@pytest.fixture
def rows(parts):
    return torch.from_numpy(Assembly.fit(D, parts[1]).rows(*parts))


def test_assembly_is_halves_of_length_one_and_scores_from_minus_one_to_one(parts):
    clip, scores = parts
    assembly = Assembly.fit(D, scores)
    rows = assembly.rows(clip, scores)
    assert rows.shape == (N, 2 * D + 3) and rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows[:, D : 2 * D], axis=1), 1, rtol=1e-6)
    assert (rows[::4, :D] == 0).all() and (rows[::4, 2 * D] == 0).all()  # text-only
    assert assembly.scores == ("clip_score", "image_reward", "llm_score")
    for i, name in enumerate(assembly.scores):
        known = ~np.isnan(scores[name])
        low, high = scores[name][known].min(), scores[name][known].max()
        expected = [-1 + 2 * (x - low) / (high - low) for x in scores[name][known]]
        np.testing.assert_allclose(rows[known, 2 * D + i], expected, atol=1e-6)


def test_the_range_is_that_of_the_fit_not_of_the_rows(parts):
    clip, scores = parts
    assembly = Assembly.fit(D, scores)
    few = assembly.rows([half[:5] for half in clip], {k: v[:5] for k, v in scores.items()})
    np.testing.assert_array_equal(few, assembly.rows(clip, scores)[:5])
    assert scaled(np.array([-9.0, 9.0, 0.5]), 0, 1).tolist() == [-1, 1, 0]
    assert scaled(np.array([2.0, np.nan]), 2, 2).tolist() == [0, 0]


@pytest.mark.parametrize("clip_width, names", [(D, ()), (0, ("clip_score",)), (D, ("llm_score",))])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_subset_of_features_and_architecture_scores_row_by_row(
    parts, architecture, clip_width, names
):
    clip, scores = parts
    assembly = Assembly.fit(clip_width, {name: scores[name] for name in names})
    rows = torch.from_numpy(assembly.rows(clip, scores))
    scorer = Scorer.new(architecture, assembly, seed=1)
    together = scorer.score(rows)
    assert together.shape == (N,) and together.unique().numel() > 20
    torch.testing.assert_close(scorer.score(rows[:7]), together[:7], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_scorer_is_a_file(tmp_path, parts, rows, architecture):
    scorer = Scorer.new(architecture, Assembly.fit(D, parts[1]), seed=1)
    scorer.save(tmp_path / "scorer.safetensors", {"steps": 3})
    again = Scorer.load(tmp_path / "scorer.safetensors")
    assert again.assembly == scorer.assembly and again.architecture == architecture
    assert torch.equal(again.score(rows), scorer.score(rows))
    scorer.save(tmp_path / "b")
    scorer.save(tmp_path / "c")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_what_is_no_scorer_is_refused_in_one_line(tmp_path):
    (tmp_path / "x").write_text(json.dumps({}))
    for name in ("x", "absent"):
        with pytest.raises(UsageError, match="is no scorer of CoIDO"):
            Scorer.load(tmp_path / name)


def trained(rows, losses, labels, **recipe):
    """Weights after thirty steps on batches of 32."""
    assembly = Assembly(D, ("a", "b", "c"), (0.0,) * 3, (1.0,) * 3)
    fitter = Fitter(Scorer.new("mlp", assembly, 0), Recipe(30, learning_rate=1e-3, **recipe))
    for batch in shuffled_batches(N, 32, 10, np.random.default_rng(1)):
        fitter.step(rows[batch], losses[batch], labels[batch])
    return fitter


def test_training_ranks_hard_samples_lowest_and_evens_out_clusters(rows):
    losses = 1 + 3 * (rows[:, 0] > 0).float()
    labels = (rows[:, 1] > 0).long()
    importance = trained(rows, losses, labels, objective="importance").scorer.score(rows)
    assert importance[losses > 2].mean() < importance[losses < 2].mean() - 0.5
    by_cluster = labels.float() * 3 + 1  # one cluster is hard throughout
    means = []
    for objective in ("importance", "sum"):
        scorer = trained(rows, by_cluster, labels, objective=objective).scorer
        weights = torch.softmax(scorer.score(rows), 0)
        means.append(abs(weights[labels == 0].mean() - weights[labels == 1].mean()))
    assert means[1] < means[0]


def test_both_losses_reach_the_scorer(rows):
    """With either term removed the scorer moves differently (promise of the issue)."""
    losses, labels = torch.linspace(0.5, 3, N), torch.arange(N) % 7
    both = trained(rows, losses, labels, objective="sum").scorer.score(rows)
    without_diversity = trained(rows, losses, labels, objective="importance").scorer.score(rows)
    # equal losses: sum_i w_i CE is constant, so only the diversity term moves anything
    without_importance = trained(rows, torch.ones(N), labels, objective="sum").scorer.score(rows)
    start = Scorer.new("mlp", Assembly(D, ("a", "b", "c"), (0.0,) * 3, (1.0,) * 3), 0).score(rows)
    found = [both, without_diversity, without_importance, start]
    for i, left in enumerate(found):
        for right in found[i + 1 :]:
            assert (left - right).abs().max() > 1e-4


def test_uncertainties_are_learnt_from_one_and_move_apart(rows):
    fitter = trained(rows, torch.linspace(0.5, 3, N), torch.arange(N) % 7)
    log_sigma = fitter.log_sigma.detach()
    assert log_sigma[0] > 0 > log_sigma[1]  # of the large loss up, of the small one down


def test_training_is_deterministic_and_leaves_the_global_generators_alone(rows):
    losses, labels = torch.linspace(0.5, 3, N), torch.arange(N) % 7
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = trained(rows, losses, labels).scorer.score(rows)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(trained(rows, losses, labels).scorer.score(rows), first)


def test_a_loss_that_is_not_finite_stops(rows):
    with pytest.raises(NonFiniteError, match="step 1"):
        trained(rows, torch.full((N,), torch.nan), torch.zeros(N, dtype=torch.int64))


def test_schedule_warms_up_and_ends_at_zero():
    values = [schedule(step, 100) for step in range(100)]
    assert values[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert all(a >= b for a, b in zip(values[3:], values[4:], strict=False)) and values[-1] < 1e-3


def test_every_sample_is_in_every_epoch_once():
    batches = list(shuffled_batches(10, 4, 2, np.random.default_rng(0)))
    assert [len(batch) for batch in batches] == [4, 4, 2] * 2
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert sorted(first) == sorted(second) == list(range(10)) and first.tolist() != second.tolist()
