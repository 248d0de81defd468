"""What many texts with one beginning share: keys and values, computed once.

Texts may share when they are run on the exact ids of the whole, so that nothing is tokenised
differently, and when the model's later positions need nothing of the earlier ones but keys and
values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

MAX_TOKENS = 32768
"""Positions in a batch, those of the prefix counted in every row: bounds a layer's keys."""


def can_share(model: PreTrainedModel) -> bool:
    """Whether keys and values of a prefix, and counted positions, are all that later text needs."""
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    layers = getattr(model.get_decoder(), "layers", [])
    return "mrope_section" not in rope and all(hasattr(layer, "self_attn") for layer in layers)


def common_prefix(ids: Tensor, labels: Tensor, lengths: Sequence[int], config: Any) -> int:
    """Positions to run once: all that the versions have in common but the last of them, or 0.

    `ids` and `labels` are (B, L). The last common position is left to every version, so that each
    of its answer tokens is predicted either in the prefix or in its own end, and each end has a
    last position. 0 if there is nothing to share or an image begins after it.
    """
    same = ((ids == ids[0]) & (labels == labels[0])).all(0)[: min(lengths)]
    n = int(same.cumprod(0).sum()) - 1
    image = getattr(config, "image_token_id", None)
    return 0 if n < 1 or image is not None and bool((ids[:, n:] == image).any()) else n


def run_prefix(
    model: PreTrainedModel, ids: Tensor, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, list[DynamicLayer]]:
    """Final states (P, H) of a beginning `ids` (P,) with its image inputs, and its layers."""
    cache = DynamicCache()
    out = model.base_model(input_ids=ids[None], past_key_values=cache, use_cache=True, **inputs)
    return out.last_hidden_state[0], cache.layers


class PrefixLayer(DynamicLayer):
    """Keys and values of the prefix in one layer, seen by every row and never grown."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        # Joined for this layer's attention only: a batch of copies of the whole cache would be
        # 8 GB for 24 orders over one image in LLaVA-1.5-7B.
        return _join(self.keys, keys), _join(self.values, values)


def continued(layers: Sequence[DynamicLayer]) -> Cache:
    """A cache that begins with the prefix and may grow; `layers` stay as they are."""
    copies = []
    for layer in layers:
        copy = DynamicLayer()
        copy.lazy_initialization(layer.keys, layer.values)
        copy.keys, copy.values = layer.keys, layer.values
        copies.append(copy)
    return Cache(copies)


def _join(shared: Tensor, own: Tensor) -> Tensor:
    return torch.cat([shared.expand(len(own), -1, -1, -1), own], dim=-2)
