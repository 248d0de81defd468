"""D2 Pruning: easy or hard samples, and few of any neighbourhood, by messages on a graph.

Adyasha Maharana, Prateek Yadav, Mohit Bansal. D2 Pruning: Message Passing for Balancing Diversity
and Difficulty in Data Pruning. ICLR 2024. https://arxiv.org/abs/2310.07931

    s_i: importance, here the AUM of the answer tokens      signals/forward.py
    graph: k nearest neighbours of the proxy's mean state   vectors/neighbours.py
    forward: s_i + sum_j exp(-gamma_f d_ij^2) s_j           forward_messages
    take the largest, then its neighbours' s_j less
    exp(-gamma_r d_ij^2) s_i, and again                     selection_order

The released loop looks for the maximum anew for every sample; a heap gives the same order.

Differs from the paper and from the code run on LLaVA-665K: docs/methods/d2_pruning.md.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from llava.errors import at_least
from selection.methods.base import Context, Method, Scored
from selection.signals.forward import Forward
from selection.vectors.neighbours import Neighbours

COLUMNS = ("mean_state",)
LEAST = 1e-7  # as released: no sample sends a message of zero or less


@dataclass(frozen=True)
class Settings:
    """How D2 passes messages; defaults as COINCIDE ran it on LLaVA-665K."""

    n_neighbours: int = 5
    """k of the graph"""
    gamma_forward: float = 1.0
    """decay of the messages that raise a sample's score, by squared distance"""
    gamma_reverse: float = 0.4
    """decay of the messages that lower the scores of a chosen sample's neighbours"""
    normalize: bool = True
    """bring the embeddings to length one; without it most distances are so large that no message
    arrives, and the order is that of the importance alone"""
    n_probe: int = 8
    """cells that are searched for neighbours in pools above 65,536 samples; 0: all"""

    def __post_init__(self) -> None:
        at_least(1, self, "n_neighbours")
        at_least(0, self, "gamma_forward", "gamma_reverse", "n_probe")


def forward_messages(importance: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """s_i + sum_j w_ij s_j (n,) over the neighbours `ids` (n, k) with `weights` (n, k).

    Importance below 1e-7 counts as that. A weight of 0 leaves a neighbour out.
    """
    sent = np.maximum(importance, LEAST)
    return sent + np.where(weights > 0, weights * sent[ids], 0.0).sum(axis=1)


def selection_order(scores: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Rows (n,) int64 in the order in which they are taken, each the largest score at its turn.

    Taking i lowers the scores of its neighbours `ids[i]` (k,) by `weights[i]` (k,) times its own.
    Equal scores go to the earlier row; a NaN score is never taken and the result is shorter.
    """
    current, neighbours, sent = scores.tolist(), ids.tolist(), weights.tolist()
    heap = [(-score, row) for row, score in enumerate(current) if score == score]
    heapq.heapify(heap)
    left, order = [score == score for score in current], []
    while heap:
        score, row = heapq.heappop(heap)
        if not left[row] or -score != current[row]:
            continue  # taken, or its score has changed since
        left[row] = False
        order.append(row)
        for other, weight in zip(neighbours[row], sent[row], strict=True):
            if weight and left[other]:
                current[other] -= weight * current[row]
                heapq.heappush(heap, (-current[other], other))
    return np.array(order, np.int64)


class D2Pruning(Method):
    """Important samples, few of any neighbourhood, by messages on a nearest-neighbour graph."""

    Settings = Settings
    presets = {"as_released": {"normalize": False}}

    def signals(self) -> dict[str, Forward]:
        return {"forward": Forward()}

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """-(place in the order in which samples are taken, from 1)."""
        reader, settings = context.readers["forward"], self.settings
        rows = reader.rows
        importance = context.values("forward", "aum")[rows]
        usable, keys = ~np.isnan(importance), context.keys(rng)[rows]
        graph = Neighbours(reader, COLUMNS, usable, keys, settings.n_probe, settings.normalize)
        ids, squares = graph.nearest(np.arange(len(rows)), usable, settings.n_neighbours)
        squares = squares.astype(np.float64)
        lifted = forward_messages(importance, ids, _decay(settings.gamma_forward, squares))
        order = selection_order(lifted, ids, _decay(settings.gamma_reverse, squares))
        scores = np.full(len(context.pool), np.nan)
        scores[rows[order]] = -1.0 - np.arange(len(order))
        return Scored(scores, {"neighbour_cells": graph.cells})


def _decay(gamma: float, squares: np.ndarray) -> np.ndarray:
    """exp(-gamma d^2); 0 at an infinite distance even when gamma is 0."""
    return np.where(np.isinf(squares), 0.0, np.exp(-gamma * np.minimum(squares, 1e300)))
