"""EL2N, perplexity, length: the right column, the right end of it, by slow loops."""

import math

import numpy as np
import pytest

from selection.methods.el2n import El2n
from selection.methods.length import Length
from selection.methods.perplexity import Perplexity, log_perplexity
from selection.rules.budget import top_k


def slow_band(values: list[float], keep: str, k: int) -> list[int]:
    """Rows of a slice of the sorted values."""
    order = sorted(range(len(values)), key=lambda row: values[row])
    n = len(order)
    start = {"low": 0, "middle": n // 2 - k // 2, "high": n - k}[keep]
    return sorted(order[start : start + k])


def perplexities(forward: dict) -> list[float]:
    pairs = zip(forward["nll_sum"], forward["n_tokens"], strict=True)
    return [math.exp(float(nll) / int(n)) for nll, n in pairs]


@pytest.mark.parametrize("keep", ["low", "middle", "high"])
@pytest.mark.parametrize(
    ("method", "values"),
    [
        (El2n, lambda forward: forward["el2n"].tolist()),
        (Perplexity, perplexities),
    ],
)
def test_the_subset_is_a_slice_of_the_ranking(world, method, values, keep):
    scores = world.run(method(method.Settings(keep=keep))).scores
    for k in (1, 44, 45, 150):
        assert top_k(scores, k).rows.tolist() == slow_band(values(world.forward), keep, k)


def test_length_takes_the_longest_and_of_equals_the_earlier(world):
    tokens = world.forward["n_tokens"] = world.forward["n_tokens"] % 7
    scores = world.run(Length()).scores
    slow = sorted(range(150), key=lambda row: (-tokens[row], row))[:60]
    assert top_k(scores, 60).rows.tolist() == sorted(slow)


@pytest.mark.parametrize(("method", "keep"), [(El2n, "middle"), (Perplexity, "middle")])
def test_the_published_band_is_the_default(method, keep):
    assert method().settings.keep == keep


def test_perplexity_that_overflows_still_ranks(world):
    world.forward["nll_sum"][5], world.forward["n_tokens"][5] = 1e6, 2
    world.forward["nll_sum"][6], world.forward["n_tokens"][6] = 3e6, 2
    scores = world.run(Perplexity(Perplexity.Settings(keep="high"))).scores
    assert np.argsort(-scores)[:2].tolist() == [6, 5]
    assert log_perplexity(np.array([6.0]), np.array([3])) == 2


@pytest.mark.parametrize("method", [El2n, Perplexity, Length])
def test_equal_scores_are_decided_by_position(world, method):
    for column in ("el2n", "nll_sum", "n_tokens"):
        world.forward[column] = np.full_like(world.forward[column], 2)
    scores = world.run(method()).scores
    first = 0 if method is Length else 75 - 22
    assert top_k(scores, 45).rows.tolist() == list(range(first, first + 45))
