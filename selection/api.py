"""Selection from Python: what the command line does, with objects in the place of flags."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava.errors import UsageError
from selection.cli import fill, has_targets, preset_of
from selection.methods import Method, get_method
from selection.methods.base import Context, Scored
from selection.output import compare as comparison
from selection.output.folder import Run
from selection.pool.pool import Pool
from selection.run import Execution
from selection.settings import Job, PoolSettings, ProxySettings, SelectSettings
from selection.store.arrays import ArrayReader


class Scores(Method):
    """Scores of your own: higher is better, NaN cannot be selected."""

    name = "scores"

    def __init__(self, scores: np.ndarray | Sequence[float] | Mapping[str, float]) -> None:
        """Take `scores` (N,) in pool order, or by uid; samples that a mapping lacks get NaN."""
        super().__init__()
        self.by_uid = dict(scores) if isinstance(scores, Mapping) else None
        given = list(self.by_uid.values()) if self.by_uid is not None else scores
        self.values = np.array(given, dtype=np.float64)
        if self.values.ndim != 1:
            raise UsageError(f"Scores: shape {self.values.shape}; give one number a sample")

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """The given scores; UsageError unless they are the pool's."""
        pool, n = context.pool, len(context.pool)
        if self.by_uid is None:
            if len(self.values) != n:
                raise UsageError(f"Scores: {len(self.values)} given for {n} samples of {pool.path}")
            return Scored(self.values)
        scores = np.array([self.by_uid.get(pool.uid(row), np.nan) for row in range(n)])
        if np.isnan(scores).all():
            raise UsageError(f"Scores: none of the {len(self.values)} uids is in {pool.path}")
        return Scored(scores)

    def content(self) -> dict[str, Any]:
        """The digest of the scores."""
        digest = hashlib.sha256(repr(sorted(self.by_uid or ())).encode())
        digest.update(self.values.tobytes())
        return {"sha256": digest.hexdigest()}


def select(
    method: str | Method | type[Method],
    pool: Pool | str | Path,
    *,
    budget: str | float | int = 0.3,
    model: str | Path | None = None,
    model_base: str | Path | None = None,
    arrays: Mapping[str, Any] | None = None,
    targets: str | Path | None = None,
    preset: str | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Choose a subset of `pool` and write its run folder, as `python -m selection select` does.

    Args:
        method: a name, `path/to/file.py:Class`, a subclass of `Method`, an object of one, or
            `Scores`.
        pool: `Pool.open(...)` with its `images`, or the path of a text-only pool.
        budget: a float or "30%" is a fraction of the pool, an integer a count.
        model, model_base: the proxy, where the method reads signals that are computed.
        arrays: numbers of your own in the place of signals, in pool order: `{"mean_state": (N, D)}`
            for whatever signal of the method has that column, or by signal,
            `{"holdout": {"nll_mean": (N,)}}`. Signals that are not given are computed.
        targets: YAML list of target tasks, for a method that has some.
        preset: named settings of the method.
        out: the run folder; by default a new one below outputs/.
        settings: settings of the method, and the flags of `select` by name (`seed`, `store`,
            `dtype`, `batch_size`, ...).

    Returns the finished run. Raises the errors of the command line, with the same words:
    `llava.errors.UserError` and its subclasses.
    """
    if not isinstance(pool, Pool):
        pool = Pool.open(pool)
    groups = {SelectSettings: {}, ProxySettings: {}}
    for group, values in groups.items():
        for field in dataclasses.fields(group):
            if field.name in settings:
                values[field.name] = settings.pop(field.name)
    method = _made(method, preset, settings)
    groups[SelectSettings] |= {"budget": _written(budget), "out": _path(out)}
    groups[ProxySettings] |= {"model": _path(model), "model_base": _path(model_base)}
    if targets is not None and not has_targets(type(method)):
        raise UsageError(f"targets: {method.name} selects for no target tasks")
    if targets is None and has_targets(type(method)):
        raise UsageError("--targets is missing")
    job = Job(
        method=method,
        pool=PoolSettings(str(pool.path), pool.images, pool.image_roots, pool.limit),
        proxy=fill(ProxySettings, groups[ProxySettings]),
        select=fill(SelectSettings, groups[SelectSettings]),
        targets=_path(targets),
        arrays=_readers(method, arrays or {}, len(pool)),
        command=("selection.select", method.origin),
    )
    return Execution(job, pool).execute()


def compare(*runs: Run | str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """What the subsets of some runs share: printed, and returned as compare.json holds it.

    With `out` the folder gets compare.json and pictures too. Raises UsageError for runs of
    different pools.
    """
    if out is not None:
        return comparison.compare(runs, out)
    with tempfile.TemporaryDirectory() as folder:
        return comparison.compare(runs, folder)


def _made(method: str | Method | type[Method], preset: str | None, values: dict) -> Method:
    """The method object, with the settings of a preset and `values` over it."""
    if isinstance(method, Method):
        if preset or values:
            names = ", ".join(values or ["preset"])
            raise UsageError(f"{names}: the method object has its settings already")
        return method
    if isinstance(method, str):
        method = get_method(method)
    elif not (isinstance(method, type) and issubclass(method, Method)):
        raise UsageError(f"method {method!r}: give a name, a Method or Scores")
    values = {**(preset_of(method, preset) if preset else {}), **values}
    return method(fill(method.Settings, values))


def _readers(method: Method, arrays: Mapping[str, Any], n: int) -> dict[str, ArrayReader]:
    """Readers of given arrays by signal; `n` is the pool's size."""
    nested = {name: value for name, value in arrays.items() if isinstance(value, Mapping)}
    flat = {name: value for name, value in arrays.items() if name not in nested}
    signals = method.signals()
    if unknown := nested.keys() - signals.keys():
        raise UsageError(f"arrays: {method.name} reads no signal {', '.join(sorted(unknown))}")
    if arrays and not signals:
        raise UsageError(f"arrays: {method.name} reads no signal")
    by_signal = dict.fromkeys(signals, flat) if flat else {}
    return {name: ArrayReader(name, of, n) for name, of in {**by_signal, **nested}.items()}


def _written(budget: str | float | int) -> str:
    """A budget as the flag has it: 1.0 stays a fraction, 1 a count."""
    if isinstance(budget, str):
        return budget
    return repr(int(budget) if isinstance(budget, int | np.integer) else float(budget))


def _path(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
