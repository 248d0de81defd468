"""What holds for every method, whatever it does: laws over a small made-up pool.

    python -m selection.methods.contract path/to/file.py:Class [its settings as flags]

tells law by law whether the method keeps it, by default settings (or those given) and by every
preset, and ends with 1 at the first that is broken. Signals are made up from what they say of their
columns: no model runs, it takes seconds. tests/selection/methods/test_contract.py holds the
project's own methods to the same laws.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selection.methods.base import Method
from selection.methods.made_up import K, World, make_world

BLOCK_SIZES = (7, 16, 150)
BAD = (0, 7, 77, 149)


def exact_subset(world: World, method: Method) -> None:
    """The subset has the exact size, in pool order, without repeats."""
    scores = world.run(method).scores
    rows = method.select(world.context(method=method), scores, K)
    assert len(rows) == K and (np.diff(rows) > 0).all(), f"{len(rows)} rows for {K}: {rows}"
    assert 0 <= rows[0] and rows[-1] < len(world.pool), f"rows outside the pool: {rows}"


def finite_scores(world: World, method: Method) -> None:
    """Scores are float64, finite or NaN, and not all alike."""
    scores = world.run(method).scores
    told = f"{scores.dtype} {scores.shape}"
    assert scores.shape == (len(world.pool),) and scores.dtype == np.float64, told
    assert not np.isinf(scores).any(), f"rows {np.flatnonzero(np.isinf(scores))} are infinite"
    n_values = len(np.unique(scores[~np.isnan(scores)]))
    assert n_values > 20, f"{n_values} values for {len(scores)} samples: position would decide"


def same_bits(world: World, method: Method) -> None:
    """The same seed gives the same bits, whatever the block size."""
    sizes = (*BLOCK_SIZES, BLOCK_SIZES[0])
    scores, artefacts, requests = set(), set(), set()
    for size in sizes:
        world.requested.clear()
        scored = world.run(method, seed=3, block_size=size)
        scores.add(scored.scores.tobytes())
        artefacts.add(str(scored.artefacts))
        requests.add(tuple(rows.tobytes() for rows in world.requested))
    assert len(scores) == 1, "the scores differ"
    assert len(artefacts) == 1, "the artefacts differ"
    assert len(requests) == 1, "the second stage asks for other rows"


def no_global_state(world: World, method: Method) -> None:
    """NumPy's global generator is neither read nor moved: randomness comes from `rng`."""
    np.random.seed(1)
    before = np.random.get_state()[1].tobytes()
    first = world.run(method).scores
    assert np.random.get_state()[1].tobytes() == before, "it was moved"
    np.random.seed(2)
    np.testing.assert_array_equal(world.run(method).scores, first)


def order_is_nothing(world: World, method: Method) -> None:
    """Another order of the pool reorders the scores.

    Up to rounding: the sums behind a score run over the same numbers in another order.
    """
    order = np.random.default_rng(0).permutation(len(world.pool))
    moved = world.reordered(world.folder / "moved", order)
    scores, again = world.run(method).scores, moved.run(method).scores
    np.testing.assert_allclose(again, scores[order], atol=1e-5)


def bad_rows_stay_out(world: World, method: Method) -> None:
    """Rows without a score are never chosen.

    Quarantined rows get NaN from methods that read signals; NaN is never selected by any.
    """
    if method.signals():
        world.bad = list(BAD)
        scores = world.run(method).scores
        assert np.isnan(scores[world.bad]).all(), f"rows without signals have {scores[world.bad]}"
        asked = {int(row) for rows in world.requested for row in rows}
        assert not set(world.bad) & asked, "the second stage asks for rows without signals"
    else:
        scores = world.run(method).scores
        scores[list(BAD)] = np.nan
    usable = np.flatnonzero(~np.isnan(scores))
    rows = method.select(world.context(method=method), scores, len(usable))
    assert rows.tolist() == usable.tolist(), f"{len(usable)} have a score, {len(rows)} are chosen"


def told_settings(world: World, method: Method) -> None:
    """Every setting has a sentence for the command line."""
    settings = type(method).Settings
    names = [setting.name for setting in dataclasses.fields(settings)]
    owners = [cls for cls in settings.__mro__ if dataclasses.is_dataclass(cls)]
    sources = [ast.parse(textwrap.dedent(inspect.getsource(cls))) for cls in owners]
    told = {
        node.target.id
        for source in sources
        for node, after in itertools.pairwise(source.body[0].body)
        if isinstance(node, ast.AnnAssign) and isinstance(getattr(after, "value", 0), ast.Constant)
    }
    assert told == set(names), f"without one: {set(names) - told}"
    assert method.__doc__ and method.__doc__ != Method.__doc__, "the class has no docstring"
    assert names == [] or settings.__dataclass_params__.frozen, "Settings are not frozen"


LAWS: tuple[Callable[[World, Method], None], ...] = (
    exact_subset,
    finite_scores,
    same_bits,
    no_global_state,
    order_is_nothing,
    bad_rows_stay_out,
    told_settings,
)


def broken_laws(method: type[Method], variants: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each law's sentence, and what breaks it, "" if nothing, for settings by their names."""
    for law in LAWS:
        broken = ""
        for variant, settings in variants.items():
            with tempfile.TemporaryDirectory() as folder:
                try:
                    law(make_world(Path(folder)), method(settings))
                except Exception as error:  # the method's own code: whatever it raises
                    broken = broken or f"{variant}: {_reason(error, method)}"
        yield law.__doc__.partition("\n")[0], broken


def _reason(error: Exception, method: type[Method]) -> str:
    """What went wrong in one line, and, for an error, where in the method's file."""
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError):
        return text
    frames, file = traceback.extract_tb(error.__traceback__), inspect.getsourcefile(method)
    frame = ([frame for frame in frames if frame.filename == file] or frames)[-1]
    return f"{type(error).__name__}: {text} ({frame.filename}, line {frame.lineno})"


def main(argv: Sequence[str]) -> int:
    """Hold the method that `argv` names to every law; 1 where one is broken."""
    from llava.flags import read_flags
    from selection.methods import get_method

    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    name, *words = argv
    method = get_method(name)
    prog = f"python -m selection.methods.contract {name}"
    (settings,) = read_flags(prog, method.__doc__ or "", words, method.Settings)
    variants = {"given settings" if words else "default settings": settings} | {
        f"preset {name}": method.Settings(**values) for name, values in method.presets.items()
    }
    for sentence, broken in broken_laws(method, variants):
        if broken:
            print(f"broken  {sentence}\n        {broken}")
            return 1
        print(f"holds   {sentence}")
    return 0


if __name__ == "__main__":
    from llava.launch import process

    process(lambda: sys.exit(main(sys.argv[1:])))
