"""Signals that are read off one forward pass over a conversation, and how several share it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llava.conversation import IGNORE_INDEX
from llava.errors import DataError
from selection.signals.base import ProxySignal, Sample

if TYPE_CHECKING:
    from torch import Tensor

    from llava.vlm.base import Batch, ForwardOut, Prepared, Vlm


@dataclass(frozen=True)
class OnePass(ProxySignal):
    """Base of signals that need a plain forward pass of the whole sample and nothing else.

    Whichever of them are asked for together come out of the same pass, each into a store of its
    own, and no number depends on which others were.
    """

    def pass_over(self) -> str:
        return "forward"

    def prepare(self, proxy: Vlm, sample: Sample) -> Prepared:
        return with_answer(proxy, sample)

    def watching(self, proxy: Vlm, batch: Batch) -> AbstractContextManager[Any]:
        """Around the pass: what is in the context is handed to `read`."""
        return nullcontext()

    def read(self, proxy: Vlm, batch: Batch, out: ForwardOut, seen: Any) -> dict[str, Tensor]:
        """The columns, (B, *shape) tensors of any floating dtype."""
        raise NotImplementedError

    @staticmethod
    def compute_together(
        signals: Sequence[OnePass], proxy: Vlm, items: list[Prepared]
    ) -> list[dict[str, np.ndarray]]:
        """What each of `signals` computes for `items`, in one forward pass."""
        batch = proxy.collate(items)
        with ExitStack() as stack:
            seen = [stack.enter_context(signal.watching(proxy, batch)) for signal in signals]
            out = proxy.forward(batch)
        return [
            _stored(signal, proxy, signal.read(proxy, batch, out, watched))
            for signal, watched in zip(signals, seen, strict=True)
        ]


def _stored(signal: OnePass, proxy: Vlm, columns: dict[str, Tensor]) -> dict[str, np.ndarray]:
    dtypes = {column.name: column.dtype for column in signal.columns(proxy)}
    with np.errstate(over="ignore"):  # what float16 cannot hold becomes inf: quarantined
        return {name: t.cpu().numpy().astype(dtypes[name]) for name, t in columns.items()}


def with_answer(proxy: Vlm, sample: Sample) -> Prepared:
    """The inputs of a sample; DataError where the model's length leaves no answer token."""
    item = proxy.prepare(sample.record, sample.image)
    if not bool((item.labels[1:] != IGNORE_INDEX).any()):
        raise DataError(f"no answer token within the first {proxy.max_length} tokens")
    return item
