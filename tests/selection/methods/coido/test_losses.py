"""CoIDO's equations against slow loops, and where their gradients go."""

import math

import numpy as np
import pytest
import torch

from selection.methods.coido.losses import (
    batch_weights,
    cluster_means,
    diversity_loss,
    importance_loss,
    total_loss,
)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=16), requires_grad=True)
    return logits, torch.tensor(rng.exponential(size=16)), torch.tensor(rng.integers(0, 9, 16))


def slow(logits, losses, labels):
    """L_I and L_D of lists, from equations 1 and 2."""
    raised = [math.exp(x) for x in logits]
    weights = [x / sum(raised) for x in raised]
    importance = sum(w * ce for w, ce in zip(weights, losses, strict=True))
    means = []
    for label in sorted(set(labels)):
        inside = [w for w, mine in zip(weights, labels, strict=True) if mine == label]
        means.append(sum(inside) / len(inside))
    centre = sum(means) / len(means)
    return importance, sum((m - centre) ** 2 for m in means) / len(means)


def fast(logits, losses, labels):
    weights = batch_weights(logits)
    return importance_loss(weights, losses), diversity_loss(weights, labels)


def test_losses_equal_slow_loops(batch):
    importance, diversity = fast(*batch)
    expected = slow(*(x.tolist() for x in batch))
    assert importance.item() == pytest.approx(expected[0], rel=1e-12)
    assert diversity.item() == pytest.approx(expected[1], rel=1e-9)


def test_only_clusters_in_the_batch_count(batch):
    weights = batch_weights(batch[0].detach())
    labels = torch.tensor([3] * 8 + [19] * 8)
    expected = torch.stack([weights[:8].mean(), weights[8:].mean()])
    torch.testing.assert_close(cluster_means(weights, labels), expected)
    assert diversity_loss(weights, torch.zeros(16, dtype=torch.int64)) == 0  # one cluster, no NaN


def test_diversity_does_not_see_what_happens_inside_a_cluster(batch):
    labels = torch.tensor([0, 0, 1, 1])
    even, uneven = torch.tensor([0.2, 0.2, 0.3, 0.3]), torch.tensor([0.1, 0.3, 0.5, 0.1])
    assert diversity_loss(even, labels) == diversity_loss(uneven, labels)


def test_gradients_are_those_of_finite_differences(batch):
    logits, losses, labels = batch
    sigma = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)

    def total(x, s):
        return total_loss(*fast(x, losses, labels), s)

    assert torch.autograd.gradcheck(total, (logits, sigma))


def test_rows_of_table_2():
    importance, diversity = torch.tensor(3.0), torch.tensor(0.5)
    sigma = torch.tensor([0.4, -0.7])
    values = {
        "importance": 3.0,
        "sum": 3.5,
        "weighted": 0.25 * 3.0 + 0.75 * 0.5,
        "uncertainty": 3.0 / math.exp(0.4) ** 2 + 0.5 / (2 * math.exp(-0.7) ** 2) + 0.4 - 0.7,
    }
    for objective, expected in values.items():
        found = total_loss(importance, diversity, sigma, objective, 0.25)
        assert found.item() == pytest.approx(expected, rel=1e-6)
    start = total_loss(importance, diversity, torch.zeros(2))
    assert start.item() == pytest.approx(3.0 + 0.25)  # sigma starts at 1


def test_a_hard_sample_is_pushed_down(batch):
    logits, _, labels = batch
    losses = torch.ones(16, dtype=torch.float64)
    losses[5] = 4.0
    importance_loss(batch_weights(logits), losses).backward()
    assert logits.grad[5] > 0 and (np.delete(logits.grad.numpy(), 5) < 0).all()
