"""Pools at the edge: every method gives the exact size, or says in one line why it cannot."""

import numpy as np
import pytest

from llava.errors import UserError
from selection.methods import find_methods

VARIANTS = [
    pytest.param(method(method.Settings(**settings)), id=f"{name}-{variant}")
    for name, method in find_methods().items()
    for variant, settings in {"default": {}, **method.presets}.items()
]
each_method = pytest.mark.parametrize("method", VARIANTS)
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


def chosen(world, method, k: int) -> np.ndarray:
    rows = method.select(world.context(), world.run(method).scores, k)
    assert len(rows) == k and (np.diff(rows) > 0).all()
    return rows


@each_method
def test_samples_that_are_all_alike(new_world, method):
    """Collapsed clusters, no neighbour nearer than another, one score for all."""
    world = new_world("alike", n=70)
    for arrays in (world.forward, *world.others.values()):
        for column in arrays.values():
            column[:] = column[1].copy()
    chosen(world, method, 20)


@each_method
@pytest.mark.parametrize("bad", [0, 3, 4])
def test_a_few_samples_of_which_some_have_no_score(new_world, method, bad):
    """Fewer than clusters, neighbours and a batch; one that is left; none."""
    world = new_world("few", n=4)
    if method.signals():
        world.bad = list(range(bad))
    try:
        rows = chosen(world, method, 1)
        assert not set(rows) & set(world.bad)
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        assert bad == 4 or method.name in ("ards", "coido", "mllm_selector", "clip_score")
