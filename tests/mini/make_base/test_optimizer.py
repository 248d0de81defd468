"""Muon's updates are orthogonal and it minimises what it should."""

import torch

from mini.make_base.optimizer import Muon, orthogonal


def test_singular_values_are_pushed_towards_one():
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    for shaped in (matrix, matrix.T):
        values = torch.linalg.svdvals(orthogonal(shaped))
        assert 0.4 < values.min() and values.max() < 1.3  # the quintic's own band


def test_update_keeps_the_singular_vectors():
    left, _, right = torch.linalg.svd(
        torch.randn(8, 8, generator=torch.Generator().manual_seed(1)), full_matrices=False
    )
    result = left.T @ orthogonal(left @ torch.diag(torch.linspace(1, 3, 8)) @ right) @ right.T
    assert (result - torch.diag(result.diagonal())).abs().max() < 1e-4


def test_least_squares_is_solved():
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(6, 6, generator=generator)
    matrix = torch.zeros(6, 6, requires_grad=True)
    optimizer = Muon([matrix], lr=0.1)
    first = float((matrix - target).square().mean().detach())
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 120)
        loss = (matrix - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.02 * first


def test_a_matrix_without_gradient_is_left_alone():
    matrix = torch.ones(3, 3, requires_grad=True)
    Muon([matrix], lr=1.0).step()
    assert torch.equal(matrix, torch.ones(3, 3))
