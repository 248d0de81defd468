import math

import numpy as np
import pytest
import torch
import xxhash

from selection.signals.gradients.sketch import (
    PROJECTIONS,
    count_sketch,
    rademacher,
    signs,
    two_sided,
)

WORD = 1 << 64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_word(key: str, index: int) -> int:
    """Word `index` of SplitMix64 in Python's own whole numbers."""
    x = (xxhash.xxh3_64_intdigest(key.encode()) + (index + 1) * 0x9E3779B97F4A7C15) % WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def slow_sign(key: str, index: int) -> int:
    return -1 if slow_word(key, index // 64) >> index % 64 & 1 else 1


def slow_sketch(values: list[float], name: str, dim: int, seed: int) -> list[float]:
    """One bucket and one sign an element."""
    out = [0.0] * dim
    for i, value in enumerate(values):
        word = slow_word(f"{seed}/shift/{name}", i // dim)
        shift = (word - WORD if word >> 63 else word) % dim  # as a signed number
        out[(i + shift) % dim] += slow_sign(f"{seed}/sign/{name}", i) * value
    return out


def slow_dense(values: list[float], name: str, dim: int, seed: int) -> list[float]:
    key = f"{seed}/sign/{name}"
    return [
        sum(v * slow_sign(key, i * dim + d) for i, v in enumerate(values)) / math.sqrt(dim)
        for d in range(dim)
    ]


def test_signs_are_splitmix64s():
    found = signs("a key", 100, 300).tolist()
    assert found == [slow_sign("a key", i) for i in range(100, 400)]


def test_signs_are_even_and_differ_between_keys():
    one, other = signs("one", 0, 1 << 16), signs("other", 0, 1 << 16)
    for found in (one, other, one * other, one[1:] * one[:-1], one[64:] * one[:-64]):
        assert abs(found.mean()) < 4 / 256  # four standard errors


@pytest.mark.parametrize(
    ("project", "slow"), [(count_sketch, slow_sketch), (rademacher, slow_dense)]
)
@pytest.mark.parametrize("dim", [7, 24, 5000])
def test_against_a_slow_loop(project, slow, dim):
    matrices = normal(2, 5, 11)
    found = project(matrices, "layers.0.q_proj.lora_A", dim, seed=3)
    for row, matrix in zip(found, matrices, strict=True):
        expected = slow(matrix.flatten().tolist(), "layers.0.q_proj.lora_A", dim, 3)
        np.testing.assert_allclose(row, expected, atol=1e-5)  # 55 float32 numbers of about 1


def test_two_sided_is_a_product_from_both_sides():
    matrix = normal(1, 6, 10)
    found = two_sided(matrix, "x", 12, seed=0)
    left = torch.tensor([slow_sign("0/left/x", i) for i in range(3 * 6)]).view(3, 6).float()
    right = torch.tensor([slow_sign("0/right/x", i) for i in range(4 * 10)]).view(4, 10).float()
    expected = left @ matrix[0] @ right.T / math.sqrt(12)
    torch.testing.assert_close(found, expected.flatten()[None])


def unit(matrix: torch.Tensor) -> torch.Tensor:
    return matrix / matrix.norm()


def rank_one() -> torch.Tensor:
    """What a short answer gives: few tokens, one direction, the same for both samples."""
    u, v = normal(16, seed=1), normal(192, seed=2)
    near = normal(16, seed=3)
    return torch.stack([unit(torch.outer(u, v)), unit(torch.outer(u + near / 2, v))])


def rank_sixteen() -> torch.Tensor:
    g, other = normal(2, 16, 192)
    return torch.stack([unit(g), unit(g + other)])


def orthogonal() -> torch.Tensor:
    u, v = torch.linalg.qr(normal(192, 2))[0].T
    w = normal(16)
    return torch.stack([unit(torch.outer(w, u)), unit(torch.outer(w, v))])


GRADIENTS = {"aligned": rank_one, "rank 16": rank_sixteen, "orthogonal": orthogonal}


def estimates(project, pair: torch.Tensor, dim: int, n: int, n_matrices: int) -> np.ndarray:
    """<S g, S v> under `n` seeds, with the gradient cut into so many matrices."""
    parts = pair.chunk(n_matrices, dim=1)
    found = []
    for seed in range(n):
        g, v = sum(project(part, f"matrix {i}", dim, seed) for i, part in enumerate(parts))
        found.append(float(g @ v))
    return np.array(found)


@pytest.mark.parametrize("kind", GRADIENTS)
def test_sketch_is_unbiased_with_the_variance_of_the_dense_projection(kind):
    pair, dim, n = GRADIENTS[kind](), 64, 2500
    g, v = pair.double().flatten(1)
    exact = float(g @ v)
    squares = float(g.square() @ v.square())
    variance = (float(g.square().sum() * v.square().sum()) + exact**2 - 2 * squares) / dim
    found = estimates(count_sketch, pair, dim, n, 2)
    assert abs(found.mean() - exact) < 4 * math.sqrt(variance / n)
    # The estimate of a variance from 2500 nearly normal numbers is off by 3 %; elements of one
    # row, one pair in 24 of a matrix, never collide.
    assert found.var() == pytest.approx(variance, rel=0.1)


@pytest.mark.parametrize("name", ["rademacher", "two_sided"])
def test_other_projections_are_unbiased(name):
    pair, dim, n = rank_sixteen(), 64, 600
    found = estimates(PROJECTIONS[name], pair, dim, n, 2)
    exact = float(pair[0].flatten() @ pair[1].flatten())
    assert abs(found.mean() - exact) < 4 * found.std() / math.sqrt(n)
    assert found.std() < 3 / math.sqrt(dim)


@pytest.mark.parametrize("start", [1, 64, 100, 640])
def test_sketches_of_shards_add_up(start):
    flat = normal(3, 1000)
    whole = count_sketch(flat, "x", 64, 0)
    parts = count_sketch(flat[:, :start], "x", 64, 0) + count_sketch(
        flat[:, start:], "x", 64, 0, start
    )
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


@pytest.mark.bits
@pytest.mark.parametrize("name", PROJECTIONS)
def test_no_bit_depends_on_the_batch(name):
    matrices = normal(9, 32, 96)
    whole = PROJECTIONS[name](matrices, "x", 160, 0)
    for part in (slice(0, 1), slice(1, 4), slice(4, 9)):
        assert torch.equal(PROJECTIONS[name](matrices[part], "x", 160, 0), whole[part])


def test_seeds_and_names_give_other_sketches():
    matrix = normal(1, 8, 8)
    found = {tuple(count_sketch(matrix, *x).flatten().tolist()) for x in NAMED}
    assert len(found) == len(NAMED)


NAMED = [("a", 16, 0), ("a", 16, 1), ("b", 16, 0)]


def test_task_mean_first_equals_the_full_matrix():
    """mean_j <S g_i, S v_j> = <S g_i, S mean_j v_j>, in one product for a whole task."""
    train, target = normal(2, 6, 8, 40)
    g, v = (count_sketch(part, "x", 64, 0) for part in (train, target))
    full = (g @ v.T).mean(1)
    torch.testing.assert_close(g @ v.mean(0), full)
    mean = count_sketch(target.mean(0, keepdim=True), "x", 64, 0)[0]
    torch.testing.assert_close(g @ mean, full)
