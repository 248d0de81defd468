"""The one base class of selection methods, and what a method is handed.

A method says which signals it reads, may ask for more signals on some rows once it has seen the
first ones, and turns them into scores. It opens no file and runs no model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import xxhash

from llava.errors import NonFiniteError
from selection.methods.source import file_digest, file_of, session_digest
from selection.rules.budget import top_k
from selection.signals.base import ProxySignal
from selection.vectors.mixing import GOLDEN, mixed

if TYPE_CHECKING:
    from selection.pool.pool import Pool
    from selection.store.store import StoreReader


@dataclass(frozen=True)
class Request:
    """A signal wanted on some pool rows only; `rows` (n,) int64, ascending."""

    signal: Any
    rows: np.ndarray


@dataclass(frozen=True)
class SecondStage:
    """What a method decided after the first signals: further requests, and its own `state`.

    It is made again, not stored, when an interrupted run continues; so it has to be a function of
    the signals, the settings and the generator alone.
    """

    requests: Mapping[str, Request] = field(default_factory=dict)
    state: Any = None


@dataclass(frozen=True)
class WarmUp:
    """A LoRA that a method wants trained on a random part of the pool, where none is named.

    The samples are those of `select random --budget SHARE --seed SEED`. `moments` asks for a
    checkpoint with Adam's moments. `fills` is the setting that names the result, `base_fills` the
    one that names the model it was trained on.
    """

    share: str = "0.05"
    seed: int = 0
    moments: bool = False
    fills: str = "model"
    base_fills: str = "model_base"

    @property
    def instead_of_model(self) -> bool:
        """Whether a run that names its `--model` needs no such training."""
        return self.fills == "model"


@dataclass(frozen=True)
class CoTrain:
    """A training in a program of the method's own, on samples that a run of the method prepared.

    `module` is started as the training program on the prepared subset, with `prepared_flag` and
    the folder of that run among its `flags`; `preparing` are the settings of that run, whose
    `budget` is one. `paper_flags` and `paper_batch` hold where the recipe has the paper's sizes.
    `fills` is the setting that names `result`, a file of the training's folder. Settings `apart` do
    not shape it.
    """

    module: str
    preparing: Mapping[str, Any]
    prepared_flag: str
    result: str
    fills: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    paper_flags: Mapping[str, Any] = field(default_factory=dict)
    paper_batch: int | None = None
    apart: frozenset[str] = frozenset()
    instead_of_model: ClassVar[bool] = True


Training = WarmUp | CoTrain


@dataclass(frozen=True)
class Scored:
    """Result of a method: `scores` (N,) float64, higher is better, NaN = cannot be selected.

    `artefacts` are kept in the run folder under their names: arrays as they are, everything else
    as JSON. `notes` are sentences for the manifest and the terminal.
    """

    scores: np.ndarray
    artefacts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A target task: its weight and, by signal, a reader for each of its `subtasks`."""

    name: str
    weight: float
    subtasks: tuple[str, ...]
    readers: Mapping[str, tuple[StoreReader, ...]]


@dataclass(frozen=True)
class Context:
    """What a method may know: facts of the pool, readers of the signals by name, what it decided
    in its second stage, the target tasks, and how many samples will be selected, `k`."""

    pool: Pool
    readers: Mapping[str, StoreReader] = field(default_factory=dict)
    stage: SecondStage = SecondStage()
    tasks: tuple[Task, ...] = ()
    k: int = 0

    def keys(self, rng: np.random.Generator) -> np.ndarray:
        """Independent uniform numbers in [0, 1), one per sample, (N,) float64.

        They follow a sample's content, not its place: another order of the pool gives every sample
        the same number. Consumes one draw of `rng`; copies of one sample get different numbers.
        """
        return _uniform(self.pool.uids, self._copies, int(rng.integers(2**63, dtype=np.uint64)))

    def values(self, signal: str, column: str) -> np.ndarray:
        """A scalar column by pool row, (N,) float64; NaN where the sample could not be scored."""
        reader = self.readers[signal]
        out = np.full(len(self.pool), np.nan)
        out[reader.rows] = reader.column(column)
        out[reader.bad_rows] = np.nan
        return out

    @cached_property
    def _copies(self) -> np.ndarray:
        """How many samples with the same uid stand before each sample, (N,)."""
        whole = np.ascontiguousarray(self.pool.uids).view("V16").ravel()
        _, group, counts = np.unique(whole, return_inverse=True, return_counts=True)
        copies = np.zeros(len(whole), np.int64)
        order = np.argsort(group, kind="stable")
        first = np.repeat(np.cumsum(counts) - counts, counts)
        copies[order] = np.arange(len(whole)) - first
        return copies


@dataclass(frozen=True)
class NoSettings:
    """A method without settings."""


class Method:
    """Base of every method. One in `selection/methods/<name>.py` is found there under that name;
    one from elsewhere is called as its class says, in lower case with underscores.

    A subclass sets `Settings` (a frozen dataclass; the sentence under each field is the command
    line's help), and overrides `score`, and as needed the others.
    """

    name: ClassVar[str]
    origin: ClassVar[str | None]
    """What `get_method` finds the class by: its name, or `path/to/file.py:Class`; None for a class
    of a notebook."""
    Settings: ClassVar[type] = NoSettings
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    rounding: ClassVar[str] = "nearest"

    def __init_subclass__(cls) -> None:
        package, _, module = cls.__module__.rpartition(".")
        if f"{package}.".startswith("selection.methods."):
            cls.name = cls.origin = module
            return
        if "name" not in vars(cls):
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
        if "origin" not in vars(cls):
            file = file_of(cls)
            cls.origin = f"{file}:{cls.__qualname__}" if file else None
        cls._sha256 = file_digest(cls)  # now: the file may change while the process goes on

    def __init__(self, settings: Any = None, /, **values: Any) -> None:
        """Take filled `Settings`, or the values of some of their fields."""
        self.settings = self.Settings(**values) if settings is None else settings

    def signals(self) -> dict[str, Any]:
        """Signals wanted for the whole pool before anything else, by the name to read them by."""
        return {}

    def target_signals(self) -> dict[str, Any]:
        """Signals wanted for the target tasks, under names of `signals()`. A method that overrides
        this has the flag `--targets`."""
        return {}

    def checkpoints(self) -> dict[str, tuple[str, str | None]]:
        """Checkpoint and base (None: `--model_base`) of the model that a signal is computed with,
        by the signal's name; the others are computed with the proxy, `--model`."""
        return {}

    def training(self) -> Sequence[Training]:
        """What is to be trained before anything is computed, for settings that name no model or
        file of their own. `selection/prepare.py` does it for what the caller leaves open."""
        return ()

    def content(self) -> dict[str, Any]:
        """What else decides the scores, JSON-serialisable: of a method from elsewhere its code."""
        if type(self).__module__.startswith("selection."):
            return {}
        return {"sha256": self._sha256 or session_digest(type(self))}

    def files(self) -> dict[str, str]:
        """Files that decide the scores, by setting; with other bytes a run is another run."""
        return {}

    def reads_proxy(self, pool: Pool, given: Container[str] = ()) -> bool:
        """Whether some signal is computed with the proxy, `--model`; those `given` are not."""
        first = {name: signal for name, signal in self.signals().items() if name not in given}
        others = self.checkpoints() if first else ()
        later = {name: r.signal for name, r in self.foreseen(pool).items() if name not in given}
        of_others = [signal for name, signal in first.items() if name not in others]
        return any(isinstance(signal, ProxySignal) for signal in [*of_others, *later.values()])

    def foreseen(self, pool: Pool) -> dict[str, Request]:
        """What `second_stage` will ask for, by name, told from the pool alone: at most so many
        rows, and rows like those it will choose. For estimates of time and disk."""
        return {}

    def second_stage(self, context: Context, rng: np.random.Generator) -> SecondStage:
        """What else has to be computed and on which rows, given the first signals."""
        return SecondStage()

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """Scores of the whole pool, from `context.readers` and `context.stage`."""
        raise NotImplementedError

    def select(self, context: Context, scores: np.ndarray, k: int) -> np.ndarray:
        """The `k` rows to keep, ascending, (k,) int64. The rule is "the best" unless overridden."""
        return top_k(scores, k).rows

    def run(
        self,
        context: Context,
        seed: int,
        extract: Callable[[Mapping[str, Request]], Mapping[str, StoreReader]],
    ) -> Scored:
        """Both stages: let `extract` compute what the second asks for, score, check the scores.

        `context.readers` holds the signals of `signals()`. Raises NonFiniteError for an infinite
        score; rows that the pool lists as bad get NaN.
        """
        stage = self.second_stage(context, stream(seed, self.name, "plan"))
        more = extract(stage.requests) if stage.requests else {}
        context = replace(context, readers={**context.readers, **more}, stage=stage)
        scored = self.score(context, stream(seed, self.name, "score"))
        return replace(scored, scores=self._checked(scored.scores, context.pool))

    def _checked(self, scores: np.ndarray, pool: Pool) -> np.ndarray:
        if scores.shape != (len(pool),) or scores.dtype != np.float64:
            raise TypeError(f"{self.name}: scores are {scores.dtype} {scores.shape}")
        if np.isinf(scores).any():
            row = int(np.flatnonzero(np.isinf(scores))[0])
            raise NonFiniteError(
                f"{self.name}: the score of row {row} is {scores[row]}: a signal overflowed; "
                "extract it again with --dtype float32"
            )
        scores = scores.copy()
        scores[list(pool.bad)] = np.nan
        return scores


def stream(seed: int, *names: str) -> np.random.Generator:
    """The generator of one purpose: a function of seed and names, not of what ran before."""
    words = np.frombuffer(xxhash.xxh3_128_digest("/".join(names).encode()), np.uint32)
    return np.random.default_rng([seed, *words.tolist()])


def _uniform(uids: np.ndarray, copies: np.ndarray, salt: int) -> np.ndarray:
    """Hash `uids` (N, 16) uint8, the copy number and the salt to uniform numbers in [0, 1)."""
    low, high = np.ascontiguousarray(uids).view("<i8").reshape(-1, 2).T
    bits = mixed((low ^ salt) + GOLDEN)
    bits = mixed((bits ^ high) + GOLDEN)
    bits = mixed(bits + copies + GOLDEN)
    return (bits.view(np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
