"""What holds for every method in the folder, whatever it does."""

import ast
import dataclasses
import inspect
import itertools
import textwrap

import numpy as np
import pytest

from selection.methods import find_methods
from selection.methods.base import Method

BLOCK_SIZES = (7, 16, 150)
K = 45
VARIANTS = [
    pytest.param(method, settings, id=f"{name}-{variant}")
    for name, method in find_methods().items()
    for variant, settings in {"default": {}, **method.presets}.items()
]
each_method = pytest.mark.parametrize(("method", "settings"), VARIANTS)


def made(method: type[Method], settings: dict) -> Method:
    return method(method.Settings(**settings))


def chosen(world, method: Method, seed: int = 0, block_size: int = 16) -> np.ndarray:
    scores = world.run(method, seed, block_size).scores
    return method.select(world.context(block_size), scores, K)


@each_method
def test_the_subset_has_the_exact_size_in_pool_order_without_repeats(world, method, settings):
    rows = chosen(world, made(method, settings))
    assert len(rows) == K and (np.diff(rows) > 0).all()
    assert 0 <= rows[0] and rows[-1] < len(world.pool)


@each_method
def test_scores_are_float64_finite_or_nan_and_not_all_alike(world, method, settings):
    scores = world.run(made(method, settings)).scores
    assert scores.shape == (len(world.pool),) and scores.dtype == np.float64
    assert not np.isinf(scores).any()
    assert len(np.unique(scores[~np.isnan(scores)])) > 20


@pytest.mark.bits
@each_method
def test_the_same_seed_gives_the_same_bits_whatever_the_block_size(world, method, settings):
    runs = [
        world.run(made(method, settings), seed=3, block_size=size)
        for size in (*BLOCK_SIZES, BLOCK_SIZES[0])
    ]
    assert len({run.scores.tobytes() for run in runs}) == 1
    assert len({str(run.artefacts) for run in runs}) == 1
    assert len({rows.tobytes() for rows in world.requested}) <= 1


@each_method
def test_the_global_generators_are_neither_read_nor_moved(world, method, settings):
    np.random.seed(1)
    before = np.random.get_state()[1].tobytes()
    first = world.run(made(method, settings)).scores
    assert np.random.get_state()[1].tobytes() == before
    np.random.seed(2)
    np.testing.assert_array_equal(world.run(made(method, settings)).scores, first)


@each_method
def test_another_order_of_the_pool_reorders_the_scores(world, tmp_path, method, settings):
    """Up to rounding: the sums behind a score run over the same numbers in another order."""
    order = np.random.default_rng(0).permutation(len(world.pool))
    moved = world.reordered(tmp_path / "moved", order)
    scores = world.run(made(method, settings)).scores
    again = moved.run(made(method, settings)).scores
    np.testing.assert_allclose(again, scores[order], atol=1e-5)


@each_method
def test_rows_without_a_score_are_never_chosen(world, method, settings):
    """Quarantined rows get NaN from methods that read signals; NaN is never selected by any."""
    method = made(method, settings)
    if method.signals():
        world.bad = [0, 7, 77, 149]
        scores = world.run(method).scores
        assert np.isnan(scores[world.bad]).all()
        assert not set(world.bad) & {int(row) for rows in world.requested for row in rows}
    else:
        scores = world.run(method).scores
        scores[[0, 7, 77, 149]] = np.nan
    usable = np.flatnonzero(~np.isnan(scores))
    assert method.select(world.context(), scores, len(usable)).tolist() == usable.tolist()


@each_method
def test_every_setting_has_a_sentence_for_the_command_line(method, settings):
    fields = [field.name for field in dataclasses.fields(method.Settings)]
    owners = [cls for cls in method.Settings.__mro__ if dataclasses.is_dataclass(cls)]
    sources = [ast.parse(textwrap.dedent(inspect.getsource(cls))) for cls in owners]
    told = {
        node.target.id
        for source in sources
        for node, after in itertools.pairwise(source.body[0].body)
        if isinstance(node, ast.AnnAssign) and isinstance(getattr(after, "value", 0), ast.Constant)
    }
    assert told == set(fields)
    assert method.__doc__ and method.__doc__ != Method.__doc__
    assert dataclasses.fields(method.Settings) == () or method.Settings.__dataclass_params__.frozen
