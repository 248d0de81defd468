"""Self-Filter: difficult samples by a score net, their neighbours put off.

Ruibo Chen et al. Your Vision-Language Model Itself Is a Strong Filter: Towards High-Quality
Instruction Tuning with Data Selection. Findings of ACL 2024. https://arxiv.org/abs/2402.12501

    x_i: CLIP features of image and text                     signals/clip.py
    w = softmax over the batch of W x; loss sum_i w_i CE_i   weighted_loss, train_net
    difficulty d_i = -W x_i                                  SelfFilter
    take the largest d*; of the samples left, the 10 nearest
    get d_j - d* cos(x, x_j)^2 gamma; and again              selection_order

The released loop sorts all samples twice for every pick. Here a heap holds the difficulties, and
the nearest samples come from lists made beforehand. A list that is used up is made anew of the
samples left, together with those of the other samples of its cell that are nearly used up: where
many samples are alike, one choice in six needs that once half of the pool is taken.

Differs from the paper and from the released code: docs/methods/self_filter.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from llava.errors import UsageError, at_least
from llava.lazy import Lazy
from selection.methods.base import Context, Method, Scored
from selection.signals.clip import DEFAULT, Clip
from selection.signals.forward import Forward
from selection.vectors import stream
from selection.vectors.neighbours import Neighbours

if TYPE_CHECKING:
    from torch import Tensor

torch = Lazy("torch")


COLUMNS = ("image_features", "text_features")
LISTED = 64
"""Neighbours of every sample that are known."""
_RENEWED = 1024  # lists that are made anew at a time
_BUFFER = 2**14
Renew = Callable[[int, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Settings:
    """How Self-Filter learns difficulties and chooses; defaults are the released ones."""

    clip: str = DEFAULT
    """CLIP checkpoint: a directory or a hub name"""
    difficulty: Literal["net", "loss"] = "net"
    """net: of the score net, trained on CLIP features and the proxy's losses; loss: the proxy's
    mean answer loss itself"""
    n_penalised: int = 10
    """nearest samples whose difficulty is lowered after each choice"""
    gamma: float = 1.0
    """how much it is lowered"""
    net_epochs: int = 3
    """epochs of the score net"""
    net_batch: int = 128
    """samples over which the score net's softmax runs"""
    net_lr: float = 2e-5
    """learning rate of the score net"""
    n_probe: int = 8
    """cells that are searched for neighbours in pools above 65,536 samples; 0: all"""

    def __post_init__(self) -> None:
        at_least(1, self, "net_epochs", "net_batch")
        at_least(0, self, "gamma", "n_probe")
        if not 0 <= self.n_penalised <= LISTED:
            raise UsageError(f"--n_penalised {self.n_penalised}: give a number in 0..{LISTED}")


def weighted_loss(logits: Tensor, nll_sum: Tensor, n_tokens: Tensor) -> Tensor:
    """The score net's loss: answer losses, weighted by the softmax of its `logits` (B,), a token.

    sum_i w_i B nll_i / (sum_i tokens_i), `nll_sum` (B,) in nats, `n_tokens` (B,).
    """
    return len(logits) * (logits.softmax(0) * nll_sum).sum() / n_tokens.sum()


def train_net(
    read: Callable[[np.ndarray], Tensor],
    nll_sum: np.ndarray,
    n_tokens: np.ndarray,
    orders: list[np.ndarray],
    batch: int,
    lr: float,
) -> Tensor:
    """W (D,) float32 of the score net, from zero, by AdamW without weight decay.

    `read` gives features (m, D) of positions; one epoch per permutation in `orders`. The losses
    (n,) of the proxy stay as they are.
    """
    losses, counts = (torch.from_numpy(x).float() for x in (nll_sum, n_tokens))
    weight = torch.zeros(read(orders[0][:1]).shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr, weight_decay=0.0)
    # The features of a large pool fill no memory: they are read _BUFFER rows at a time, of which
    # a batch takes its share; the last of a buffer may be smaller.
    with torch.inference_mode(False), torch.enable_grad():
        for order in orders:
            for start in range(0, len(order), _BUFFER):
                positions = order[start : start + _BUFFER]
                features, buffered = read(positions), torch.from_numpy(positions)
                for part in torch.arange(len(positions)).split(batch):
                    rows = buffered[part]
                    loss = weighted_loss(features[part] @ weight, losses[rows], counts[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
    return weight.detach()


def selection_order(
    difficulty: np.ndarray,
    ids: np.ndarray,
    cosines: np.ndarray,
    n: int,
    n_penalised: int,
    gamma: float,
    renew: Renew,
) -> tuple[np.ndarray, np.ndarray, int]:
    """The first `n` rows taken, the difficulties (N,) then, and how often `renew` was called.

    `ids` (N, k) and `cosines` (N, k) are the nearest neighbours, nearest first, -1 for none.
    `renew(row, left, difficulties)` gives rows (m,), `row` among them, and the ids (m, k) and
    cosines (m, k) of the nearest of the rows where `left` (N,) bool; both lists are overwritten
    there. Equal difficulties go to the earlier row; NaN is never taken.
    """
    current, left = difficulty.copy(), ~np.isnan(difficulty)
    heap = [(-score, row) for row, score in enumerate(current.tolist()) if left[row]]
    heapq.heapify(heap)
    order, n_renewals = [], 0
    while heap and len(order) < n:
        score, row = heapq.heappop(heap)
        if not left[row] or -score != current[row]:
            continue  # taken, or its difficulty has changed since
        left[row] = False
        order.append(row)
        # Of its list only samples that are left are penalised; one that was not cut holds all
        # that there are and needs no renewal however few they be.
        open_ = (ids[row] >= 0) & left[ids[row]]
        if np.count_nonzero(open_) < n_penalised and ids[row, -1] >= 0:
            renewed, ids_now, cosines_now = renew(row, left, current)
            ids[renewed], cosines[renewed] = ids_now, cosines_now
            open_, n_renewals = ids[row] >= 0, n_renewals + 1
        # The old entries of these samples stay in the heap and are passed over when they come.
        others, near = ids[row][open_][:n_penalised], cosines[row][open_][:n_penalised]
        current[others] -= current[row] * near.astype(np.float64) ** 2 * gamma
        for other in others.tolist():
            heapq.heappush(heap, (-float(current[other]), other))
    return np.array(order, np.int64), current, n_renewals


def nearly_used(
    row: int, cells: np.ndarray, ids: np.ndarray, left: np.ndarray, difficulty: np.ndarray
) -> np.ndarray:
    """`row`, and rows left in its cell whose list `ids` (N, k) is cut and less than half left.

    Of more than `_RENEWED` the most difficult, which are taken first. `cells` (N,) gives the cell
    of every row, `left` (N,) bool and `difficulty` (N,) those that are left and their order.
    """
    rows = np.flatnonzero((cells == cells[row]) & left)
    n_open = np.count_nonzero(left[ids[rows]], axis=1)
    rows = rows[(ids[rows, -1] >= 0) & (n_open < ids.shape[1] / 2)]
    hardest = np.argsort(-difficulty[rows], kind="stable")[: _RENEWED - 1]
    return np.concatenate([[row], rows[hardest]])


class SelfFilter(Method):
    """Difficult samples by a score net on CLIP features, their neighbours put off."""

    Settings = Settings

    def signals(self) -> dict[str, Clip | Forward]:
        return {"clip": Clip(self.settings.clip), "forward": Forward()}

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """-(place in the order of choice, from 1); beyond the budget, by what difficulty is left.

        Artefact: the difficulty of every sample before any choice.
        """
        settings, reader = self.settings, context.readers["clip"]
        rows, keys = reader.rows, context.keys(rng)
        difficulty = self._difficulty(context, rng)[rows]
        usable = ~np.isnan(difficulty)
        graph = Neighbours(reader, COLUMNS, usable, keys[rows], settings.n_probe, True)
        ids, squares = graph.nearest(np.arange(len(rows)), usable, LISTED)

        def renew(
            row: int, left: np.ndarray, now: np.ndarray
        ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            renewed = nearly_used(row, graph.cells, ids, left, now)
            ids_now, squares_now = graph.nearest(renewed, left, LISTED)
            return renewed, ids_now, 1 - squares_now / 2

        # Of unit vectors a squared distance is 2 - 2 cosine.
        order, after, n_renewals = selection_order(
            difficulty,
            ids,
            1 - squares / 2,
            context.k,
            settings.n_penalised,
            settings.gamma,
            renew,
        )
        # No penalty reaches beyond the budget: the rest goes by what the last choice left.
        after[order] = np.nan
        rest = np.argsort(-after, kind="stable")[: np.count_nonzero(~np.isnan(after))]
        taken, scores = np.concatenate([order, rest]), np.full(len(context.pool), np.nan)
        scores[rows[taken]] = -1.0 - np.arange(len(taken))
        note = f"neighbours were searched again {n_renewals} times for {len(order)} choices"
        artefacts = {"difficulty": difficulty, "neighbour_cells": graph.cells}
        return Scored(scores, artefacts, (note,))

    def _difficulty(self, context: Context, rng: np.random.Generator) -> np.ndarray:
        """d_i by pool row, (N,) float64; NaN for a sample that either model cannot score."""
        reader, settings = context.readers["clip"], self.settings
        losses, counts = (context.values("forward", name) for name in ("nll_sum", "n_tokens"))
        losses[reader.bad_rows] = np.nan
        if settings.difficulty == "loss":
            return losses / counts
        rows = reader.rows
        usable = np.flatnonzero(~np.isnan(losses[rows]))

        def read(positions: np.ndarray) -> Tensor:
            return stream.unit(stream.take(reader, COLUMNS, positions))

        # An epoch's order follows what the samples hold, so that the pool's order is no matter.
        orders = [
            usable[np.argsort(context.keys(rng)[rows[usable]])] for _ in range(settings.net_epochs)
        ]
        weight = train_net(
            read, losses[rows], counts[rows], orders, settings.net_batch, settings.net_lr
        )
        difficulty = np.full(len(context.pool), np.nan)
        for part, logits in stream.apply(reader, COLUMNS, lambda _, x: stream.cosines(x, weight)):
            difficulty[rows[part]] = -logits
        difficulty[np.isnan(losses)] = np.nan
        return difficulty
