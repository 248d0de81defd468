"""Many short texts behind one prefix as one sequence, in which what they share stands once.

The orders of a question's options are a tree: every order that shows "red" first goes on from the
same tokens. Its nodes are put one after another and each attends to the prefix, to the nodes on its
way from the root and to itself. So no key is copied for a text, and a layer sees one long row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class Tree(NamedTuple):
    """The N nodes of a tree of tokens, each after its parent."""

    ids: Tensor
    """(N,) int64"""
    sees: Tensor
    """(N, N) bool: whether a node (row) attends to another, itself included"""
    ends: list[int]
    """node of each text's last token"""

    @property
    def depths(self) -> Tensor:
        """How many nodes come before each on its way, (N,) int64."""
        return self.sees.sum(1) - 1


def grow(texts: Sequence[Sequence[int]]) -> Tree:
    """The tree of `texts`, ids each; none may be empty."""
    nodes: dict[tuple[int, int], int] = {}  # by parent and token
    ends = []
    for text in texts:
        node = -1
        for token in text:
            node = nodes.setdefault((node, token), len(nodes))
        ends.append(node)
    sees = torch.eye(len(nodes), dtype=torch.bool)
    for node, (parent, _) in enumerate(nodes):
        if parent >= 0:
            sees[node] |= sees[parent]
    return Tree(torch.tensor([token for _, token in nodes]), sees, ends)


def attention_mask(sees: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Mask (1, 1, Q, K) bool of the last Q positions, which see the prefix and what `sees` says.

    `sees` (Q, K - P) is of the nodes so far, `keys` (K,) int64 the positions of prefix and nodes.
    Nothing that is `window` or more positions back is seen.
    """
    n_queries, n_nodes = sees.shape
    prefix = torch.ones(n_queries, len(keys) - n_nodes, dtype=torch.bool)
    mask = torch.cat([prefix, sees], 1)
    if window is not None:
        mask &= keys[-n_queries:, None] - keys < window
    return mask[None, None]


def has_one_mask(model: PreTrainedModel) -> bool:
    """Whether all layers of a model's decoder see the same positions."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"]
    return set(kinds) in ({"full_attention"}, {"sliding_attention"})


def window_of(model: PreTrainedModel) -> int | None:
    """Positions that attention reaches back, of a model that `has_one_mask`; None: all."""
    text = model.config.get_text_config()
    if "full_attention" in (getattr(text, "layer_types", None) or ()):
        return None
    return getattr(text, "sliding_window", None)
