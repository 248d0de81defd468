"""CoIDO's losses, one function per equation. Batches are those of all processes together.

A sample's score w is the softmax over the batch of what the scorer says; a low w marks a sample
that is hard (its cross-entropy pushes w down) and whose cluster is not over-represented.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selection.methods.coido.settings import Objective


def batch_weights(logits: Tensor) -> Tensor:
    """w (B,): softmax of the scorer's `logits` (B,) over the batch."""
    return torch.softmax(logits, dim=0)


def importance_loss(weights: Tensor, cross_entropy: Tensor) -> Tensor:
    """L_I = sum_i w_i CE_i (eq. 1), of `weights` and the samples' mean losses (B,), in nats."""
    return (weights * cross_entropy).sum()


def cluster_means(weights: Tensor, labels: Tensor) -> Tensor:
    """Mean weight of every cluster in the batch, (m,), of `weights` and int64 `labels` (B,)."""
    _, member = labels.unique(return_inverse=True)
    counts = torch.bincount(member)
    return torch.zeros(len(counts), dtype=weights.dtype).index_add(0, member, weights) / counts


def diversity_loss(weights: Tensor, labels: Tensor) -> Tensor:
    """L_D = Var of the cluster means (eq. 2) over the clusters present; 0 when there is one."""
    return cluster_means(weights, labels).var(correction=0)


def total_loss(
    importance: Tensor,
    diversity: Tensor,
    log_sigma: Tensor,
    objective: Objective = "uncertainty",
    balance: float = 0.5,
) -> Tensor:
    """Equation 14, or another row of table 2.

    uncertainty   L_I / s_I^2 + L_D / (2 s_D^2) + log s_I + log s_D; `log_sigma` (2,) holds the logs
    importance    L_I
    sum           L_I + L_D
    weighted      a L_I + (1 - a) L_D, `balance` a
    """
    if objective == "importance":
        return importance
    if objective == "sum":
        return importance + diversity
    if objective == "weighted":
        return balance * importance + (1 - balance) * diversity
    precision = torch.exp(-2 * log_sigma)
    return precision[0] * importance + precision[1] * diversity / 2 + log_sigma.sum()
