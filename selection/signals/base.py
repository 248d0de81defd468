"""What a signal is: per-sample arrays that one kind of model run produces."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from llava.records import Record
    from llava.vlm.base import Vlm
    from selection.pool.pool import Pool
    from selection.settings import ProxySettings
    from selection.store.key import Column
    from selection.store.store import StoreReader


class Scorer(Protocol):
    """What a signal is computed with: the proxy (`llava.vlm.base.Vlm`), CLIP, a judge's answers."""

    def identity(self) -> dict[str, Any]:
        """What about it decides numbers, JSON-serialisable."""


class Item(Protocol):
    """One prepared sample; `llava.vlm.base.Prepared` is the usual one."""

    @property
    def n_tokens(self) -> int:
        """Tokens it takes in a batch, padding included."""

    @property
    def key(self) -> Any:
        """Hashable; items with equal keys may share a batch."""


@dataclass(frozen=True)
class Sample:
    """One pool sample as a signal sees it. `image` is None for a text-only record."""

    row: int
    uid: str
    record: Record
    image: Image | None


@dataclass(frozen=True)
class Signal:
    """Base of all signals: a frozen dataclass whose fields are the settings that decide numbers.

    `prepare` runs in loader processes and must not touch the model; `compute` runs batches whose
    items all have the same `key`. A signal is a `ProxySignal` or an `OwnModelSignal`.
    """

    name: ClassVar[str]
    schema: ClassVar[int] = 1
    """Raised whenever the code changes the numbers."""
    may_be_nan: ClassVar[tuple[str, ...]] = ()
    """Columns in which NaN means "does not apply" rather than a failed computation."""
    reads_images: ClassVar[bool] = True
    """False: the samples are prepared without their images."""

    def identity(self) -> dict[str, Any]:
        """What decides the numbers besides the scorer and the pool."""
        return {"settings": asdict(self), "schema": self.schema}

    def reads(self, scorer: Scorer) -> dict[str, Any]:
        """What decides the numbers and comes with the scorer, but is no part of its identity."""
        return {}

    def begin(self, scorer: Scorer, pool: Pool, rows: np.ndarray) -> None:
        """What one process does before any row is prepared, when a store is not complete."""

    def columns(self, scorer: Scorer) -> list[Column]:
        """Names, shapes and dtypes of what `compute` returns."""
        raise NotImplementedError

    def prepare(self, scorer: Scorer, sample: Sample) -> Item:
        """Inputs of one sample. Raises `UserError` when the sample cannot be used."""
        raise NotImplementedError

    def compute(self, scorer: Scorer, items: list[Item]) -> dict[str, np.ndarray]:
        """One array (B, *shape) per column for a batch of B prepared samples."""
        return self.compute_together([self], scorer, items)[0]

    def pass_over(self) -> Hashable:
        """Signals that give the same here come out of one pass: `compute_together` takes them.

        No number may depend on which others there are.
        """
        return self

    @staticmethod
    def compute_together(
        signals: Sequence[Any], scorer: Scorer, items: list[Item]
    ) -> list[dict[str, np.ndarray]]:
        """What `compute` gives for each of `signals`."""
        raise NotImplementedError


@dataclass(frozen=True)
class ProxySignal(Signal):
    """A signal of the proxy, `--model`, or of another vision-language model in its place."""

    def prepare(self, scorer: Vlm, sample: Sample) -> Item:
        return scorer.prepare(sample.record, sample.image)


@dataclass(frozen=True)
class OwnModelSignal(Signal):
    """A signal that brings its own scorer, which may read other signals."""

    def before(self, pool: Pool, rows: np.ndarray) -> dict[str, tuple[OwnModelSignal, np.ndarray]]:
        """Signals that `open_model` reads, by name, and the pool rows they are wanted on."""
        return {}

    def open_model(
        self, pool: Pool, readers: Mapping[str, StoreReader], settings: ProxySettings
    ) -> Scorer:
        """The scorer, run as `settings` say (dtype, device).

        `readers` are those of `before`; an estimate of the cost comes without any.
        """
        raise NotImplementedError

    def forecast(self, scorer: Scorer, pool: Pool, rows: np.ndarray) -> str | None:
        """What `rows` would cost, where computing a few of them would not tell."""
        return None
