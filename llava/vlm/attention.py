"""The attention row of each sample's last real token, without any L x L matrix.

transformers lets one register an attention function. Ours runs PyTorch's scaled dot-product
attention as usual (its flash kernels included, because no padding mask is ever passed) and, in
the last text layer only, also computes one softmax row a sample. Measured: the cost of a plain
forward, where `output_attentions=True` needs 1.5-2 times the time and 8-20 times the memory
(docs/Performance.md). Nothing is hooked or copied: queries and keys arrive with their rotary
positions applied, whatever the architecture does for them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from llava.errors import UsageError

NAME = "sdpa_last_row"


def last_row(
    query: Tensor,
    key: Tensor,
    last: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of position `last[b]` over positions 0..last[b], mean over heads: (B, S) float32.

    `query` (B, heads, Q, D), `key` (B, key heads, S, D), `last` (B,) int64. Key heads are shared by
    `heads / key heads` query heads each. The first S - Q positions come from a cache; `last` counts
    from after them. `mask` is None (causal) or what the model made: (B or 1, heads or 1, Q, S),
    boolean (true: visible) or additive. `window` hides keys that are `window` or more positions
    back. Positions after `last[b]` get exactly 0.
    """
    n, heads, n_queries, width = query.shape
    groups, length = key.shape[1:3]
    index = torch.arange(n, device=query.device)
    q = query[index, :, last].float().view(n, groups, heads // groups, width)
    # One product a sample: batched ones round differently for different batch sizes.
    products = [a @ b.float().transpose(1, 2) for a, b in zip(q, key, strict=True)]
    logits = torch.stack(products).view(n, heads, length) * scaling
    if mask is not None:
        row = mask.expand(n, -1, -1, -1)[index, :, last][..., :length]  # (B, heads or 1, S)
        logits = logits.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else logits + row
    position = torch.arange(length, device=query.device) - (length - n_queries)
    hidden = position > last[:, None]
    if window is not None:
        hidden |= position <= last[:, None] - window
    return logits.masked_fill(hidden[:, None], -torch.inf).softmax(-1).mean(1)


class LastRow:
    """Makes a text decoder record the last layer's row inside `with last_row:`.

    Set `last` (B,) int64 before each forward; `row` (B, S) float32 is there after it. The decoder
    is switched to the registered function for good: outside the context that is plain SDPA.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        layers = getattr(decoder, "layers", None)
        self._module: nn.Module | None = getattr(layers[-1], "self_attn", None) if layers else None
        if self._module is None:
            raise UsageError(
                f"{type(decoder).__name__}: its last layer has no `self_attn`, so the attention "
                "row cannot be read; choose a model with an ordinary transformer decoder"
            )
        decoder.set_attn_implementation(NAME)
        if decoder.config._attn_implementation != NAME:
            raise UsageError(
                f"{type(decoder).__name__} does not accept a registered attention function; "
                "choose another model or a newer transformers"
            )
        self.last: Tensor | None = None
        self.row: Tensor | None = None

    def __enter__(self) -> LastRow:
        self._module.last_row = self
        return self

    def __exit__(self, *_: object) -> None:
        del self._module.last_row


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    recorder: LastRow | None = getattr(module, "last_row", None)
    if recorder is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        window = kwargs.get("sliding_window")
        recorder.row = last_row(query, key, recorder.last, scale, attention_mask, window)
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


# Without a mask function of the same name transformers passes no mask at all, not even a
# sliding window's: always register both.
AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
