"""What many texts with one beginning share: keys and values, computed once.

Texts may share when they are run on the exact ids of the whole, so that nothing is tokenised
differently, and when the model's later positions need nothing of the earlier ones but keys and
values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

MAX_TOKENS = 32768
"""Positions in a batch, those of the prefix counted in every row: bounds a layer's keys."""


class Version(Protocol):
    """One conversation as the model reads it, images expanded: `input_ids`, `labels` (L,) int64.

    `token_inputs` are further model inputs with one number a token, (L,) each.
    """

    input_ids: Tensor
    labels: Tensor
    token_inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Prefix:
    """A beginning that was run once."""

    states: Tensor
    """after the final norm, (P, H)"""
    layers: Sequence[DynamicLayer]
    """keys and values of each layer; none of an empty beginning"""

    def __len__(self) -> int:
        return len(self.states)

    def for_rows(self) -> Cache:
        """A cache that every row of a batch begins with, and that no batch makes longer."""
        return Cache([_SharedLayer(layer) for layer in self.layers])

    def for_one(self) -> Cache:
        """A cache that begins with the prefix and grows; the prefix itself stays as it is."""
        return Cache([_begun(DynamicLayer(), layer) for layer in self.layers])


def can_share(model: PreTrainedModel) -> bool:
    """Whether keys and values of a prefix, and counted positions, are all that later text needs."""
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    layers = getattr(model.get_decoder(), "layers", [])
    return "mrope_section" not in rope and all(hasattr(layer, "self_attn") for layer in layers)


def shared_length(model: PreTrainedModel, versions: Sequence[Version]) -> int:
    """How many positions of `versions` this model can run once: `common_prefix`, or 0.

    0 for models that cannot share, and for versions whose tokens are told apart by type.
    """
    if not can_share(model) or any(version.token_inputs for version in versions):
        return 0
    return common_prefix(versions, model.config)


def common_prefix(versions: Sequence[Version], config: Any) -> int:
    """Positions that the versions have in common, ids and labels, but the last of them; or 0.

    The last common position is left to every version, so that each of its answer tokens is
    predicted either in the prefix or in its own end, and each end has a last position. 0 if there
    is nothing to share or an image begins after it.
    """
    shortest = min(len(version.input_ids) for version in versions)
    ids = torch.stack([version.input_ids[:shortest] for version in versions])
    labels = torch.stack([version.labels[:shortest] for version in versions])
    same = ((ids == ids[0]) & (labels == labels[0])).all(0)
    n = max(0, int(same.cumprod(0).sum()) - 1)
    image = getattr(config, "image_token_id", None)
    late = image is not None and any(bool((v.input_ids[n:] == image).any()) for v in versions)
    return 0 if late else n


def run_prefix(model: PreTrainedModel, ids: Tensor, inputs: Mapping[str, Tensor]) -> Prefix:
    """Run a beginning `ids` (P,) with its image inputs; without ids nothing is run."""
    if not len(ids):
        width = model.config.get_text_config().hidden_size
        return Prefix(torch.zeros(0, width, dtype=model.dtype, device=ids.device), ())
    cache = DynamicCache()
    out = model.base_model(input_ids=ids[None], past_key_values=cache, use_cache=True, **inputs)
    return Prefix(out.last_hidden_state[0], cache.layers)


class _SharedLayer(DynamicLayer):
    """Keys and values of the prefix in one layer, seen by every row and never grown."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        _begun(self, layer)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        # Joined for this layer's attention only: a batch of copies of the whole cache would be
        # 8 GB for 24 orders over one image in LLaVA-1.5-7B.
        return _joined(self.keys, keys), _joined(self.values, values)


def _begun(new: DynamicLayer, layer: DynamicLayer) -> DynamicLayer:
    """`new`, holding what `layer` does."""
    new.lazy_initialization(layer.keys, layer.values)
    new.keys, new.values = layer.keys, layer.values
    return new


def _joined(shared: Tensor, ends: Tensor) -> Tensor:
    return torch.cat([shared.expand(len(ends), -1, -1, -1), ends], dim=-2)
