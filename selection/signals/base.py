"""What a signal is: per-sample arrays that one kind of model run produces."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from PIL.Image import Image

from llava.vlm.base import Vlm
from selection.store.store import Column

if TYPE_CHECKING:
    from llava.records import Record
    from selection.pool.pool import Pool
    from selection.store.store import StoreReader


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
    items all have the same `key`.
    """

    name: ClassVar[str]
    schema: ClassVar[int] = 1
    """Raised whenever the code changes the numbers."""
    may_be_nan: ClassVar[tuple[str, ...]] = ()
    """Columns in which NaN means "does not apply" rather than a failed computation."""
    uses_proxy: ClassVar[bool] = True
    """False: computed with what `open_model` returns."""
    reads_images: ClassVar[bool] = True
    """False: the samples are prepared without their images."""

    def identity(self) -> dict[str, Any]:
        """What decides the numbers besides proxy and pool."""
        return {"settings": asdict(self), "schema": self.schema}

    def reads(self, proxy: Vlm) -> dict[str, Any]:
        """What decides the numbers and comes with the proxy, but is no part of its identity."""
        return {}

    def before(self, pool: Pool, rows: np.ndarray) -> dict[str, tuple[Signal, np.ndarray]]:
        """Signals that `open_model` reads, by name, and the pool rows they are wanted on."""
        return {}

    def open_model(
        self, pool: Pool, readers: Mapping[str, StoreReader], dtype: str, device: str
    ) -> Any:
        """What is handed to the other functions in the place of the proxy; it has `identity()`.

        `readers` are those of `before`; an estimate of the cost comes without any.
        """
        raise NotImplementedError

    def begin(self, proxy: Vlm, pool: Pool, rows: np.ndarray) -> None:
        """What one process does before any row is prepared, when a store is not complete."""

    def forecast(self, proxy: Vlm, pool: Pool, rows: np.ndarray) -> str | None:
        """What `rows` would cost, where computing a few of them would not tell."""
        return None

    def columns(self, proxy: Vlm) -> list[Column]:
        """Names, shapes and dtypes of what `compute` returns."""
        raise NotImplementedError

    def prepare(self, proxy: Vlm, sample: Sample) -> Item:
        """Model inputs of one sample. Raises `UserError` when the sample cannot be used."""
        return proxy.prepare(sample.record, sample.image)

    def compute(self, proxy: Vlm, items: list[Item]) -> dict[str, np.ndarray]:
        """One array (B, *shape) per column for a batch of B prepared samples."""
        return self.compute_together([self], proxy, items)[0]

    def pass_over(self) -> Hashable:
        """Signals that give the same here come out of one pass: `compute_together` takes them.

        No number may depend on which others there are.
        """
        return self

    @staticmethod
    def compute_together(
        signals: Sequence[Any], proxy: Vlm, items: list[Item]
    ) -> list[dict[str, np.ndarray]]:
        """What `compute` gives for each of `signals`."""
        raise NotImplementedError
