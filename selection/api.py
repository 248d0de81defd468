"""Selection from Python: what the command line does, with objects in the place of flags."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava.errors import UsageError
from selection.cli import job_of
from selection.methods import Method, get_method
from selection.methods.base import Context, Scored
from selection.output import compare as comparison
from selection.output.folder import Run
from selection.pool.pool import Pool
from selection.run import Execution
from selection.store.arrays import ArrayReader

_WHERE = {"images", "image_roots", "limit"}
_BY_SIGNAL = '{"signal": {"column": array}}'


class Scores(Method):
    """Scores of your own: higher is better, NaN cannot be selected."""

    name = "scores"
    origin = None

    def __init__(self, scores: np.ndarray | Sequence[float] | Mapping[str, float]) -> None:
        """Take `scores` (N,) in pool order, or by uid; samples that a mapping lacks get NaN."""
        super().__init__()
        by_uid = dict(sorted(scores.items())) if isinstance(scores, Mapping) else None
        try:
            self.values = np.array(scores if by_uid is None else [*by_uid.values()], np.float64)
        except (TypeError, ValueError) as error:
            raise UsageError(f"Scores: {error}") from None
        if self.values.ndim != 1:
            raise UsageError(f"Scores: shape {self.values.shape}; give one number a sample")
        if np.isinf(self.values).any():
            raise UsageError("Scores: one is infinite; NaN keeps a sample out")
        self.by_uid = by_uid

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
        digest = hashlib.sha256(repr([*(self.by_uid or ())]).encode())
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
        pool: `Pool.open(...)`, or its path with `images`, `image_roots` and `limit` among the
            settings.
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
    method = get_method(method) if isinstance(method, str) else method
    if isinstance(method, Method):
        names = {field.name for field in dataclasses.fields(method.Settings)}
        if told := ["preset"] * bool(preset) + sorted(names & settings.keys()):
            raise UsageError(f"{', '.join(told)}: the method object has its settings already")
    elif not (isinstance(method, type) and issubclass(method, Method)):
        raise UsageError(f"method {method!r}: give a name, a Method or Scores")
    where = {name: settings.pop(name) for name in _WHERE & settings.keys()}
    if not isinstance(pool, Pool):
        pool = Pool.open(pool, **where)
    elif where:
        raise UsageError(f"{', '.join(sorted(where))}: give it to Pool.open, the pool is open")
    given = {"pool": pool.path, "images": pool.images, "limit": pool.limit, "out": out}
    given |= {"model": model, "model_base": model_base, "targets": targets}
    settings |= {name: value for name, value in given.items() if value is not None}
    settings |= {"image_roots": pool.image_roots, "budget": _written(budget)}
    job = job_of(method, settings, preset)
    job = dataclasses.replace(job, arrays=_readers(job.method, arrays or {}, pool))
    return Execution(job, pool).execute()


def compare(*runs: Run | str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """What the subsets of some runs share: printed, and returned as compare.json holds it.

    With `out` the folder gets compare.json and pictures too. Raises UsageError for runs of
    different pools.
    """
    return comparison.compare(runs, out)


def _readers(method: Method, arrays: Mapping[str, Any], pool: Pool) -> dict[str, ArrayReader]:
    """Readers of given arrays by signal. Raises UsageError for one that the method does not read,
    or that it holds against the same signal of target tasks."""
    nested = {name: value for name, value in arrays.items() if isinstance(value, Mapping)}
    flat = {name: value for name, value in arrays.items() if name not in nested}
    signals, later = method.signals(), method.foreseen(pool)
    if arrays and not signals:
        raise UsageError(f"arrays: {method.name} reads no signal")
    if unknown := nested.keys() - signals.keys() - later.keys():
        raise UsageError(
            f"arrays: {method.name} reads no signal {', '.join(sorted(unknown))}; it reads "
            f"{', '.join({**signals, **later})}"
        )
    if flat and len(set(signals.values())) < len(signals):
        raise UsageError(f"arrays: {method.name} reads one signal twice; give them as {_BY_SIGNAL}")
    by_signal = {**(dict.fromkeys(signals, flat) if flat else {}), **nested}
    if compared := by_signal.keys() & method.target_signals().keys():
        raise UsageError(
            f"arrays: {method.name} compares {', '.join(sorted(compared))} with what a model "
            "computes of the target tasks; give a model"
        )
    return {name: ArrayReader(name, columns, pool) for name, columns in by_signal.items()}


def _written(budget: str | float | int) -> str:
    """A budget as the flag has it: 1.0 stays a fraction, 1 a count."""
    if isinstance(budget, str):
        return budget
    return repr(int(budget) if isinstance(budget, int | np.integer) else float(budget))
