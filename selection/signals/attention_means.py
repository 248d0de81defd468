"""What the attention blocks of several layers add for the image and for the text (COINCIDE).

Of each of `n_layers` evenly spaced layers, with M its attention block's output before the residual:

    vision     (layers x H,)  tanh of the mean of M over the image tokens, per layer, length one
    language   (layers x H,)  the same over all other tokens that follow the fixed prompt

Both hold one unit block per layer, in order. A text-only sample has zeros for `vision`. The fixed
prompt is what all conversations begin with (system prompt, USER:). Hooks take the means layer by
layer, so no states of other layers are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from llava.lazy import Lazy
from llava.records import Record, Turn
from selection.signals.onepass import OnePass
from selection.store.store import Column

if TYPE_CHECKING:
    from torch import Tensor

    from llava.vlm.base import Batch, ForwardOut, Vlm

torch = Lazy("torch")
F = Lazy("torch.nn.functional")


_prompts: WeakKeyDictionary[Vlm, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class Blocks(OnePass):
    """Mean attention outputs of image and text, of several layers."""

    name: ClassVar[str] = "blocks"

    n_layers: int = 5
    """how many layers, evenly spaced; fewer where the model has not as many"""

    def columns(self, proxy: Vlm) -> list[Column]:
        n_layers = len(layers_read(len(proxy.decoder.layers), self.n_layers))
        shape = (n_layers * proxy.hidden_size,)
        return [Column(name, shape, proxy.stored_dtype) for name in ("vision", "language")]

    @contextmanager
    def watching(self, proxy: Vlm, batch: Batch) -> Iterator[list[Tensor]]:
        """Collects the means (B, 2, H) float32 of each layer, in order."""
        weights = mean_weights(proxy, batch)
        means: list[Tensor] = []

        def take(module: Any, inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            # One product a sample: batched ones round differently for different batch sizes.
            products = [a @ b.float() for a, b in zip(weights, states, strict=True)]
            means.append(torch.stack(products))

        layers = proxy.decoder.layers
        with ExitStack() as stack:
            for i in layers_read(len(layers), self.n_layers):
                stack.callback(layers[i].self_attn.register_forward_hook(take).remove)
            yield means

    def read(self, proxy: Vlm, batch: Batch, out: ForwardOut, seen: list[Tensor]) -> dict:
        blocks = unit_blocks(torch.stack(seen, dim=2))  # (B, 2, layers, H)
        vision, language = blocks.flatten(2).unbind(1)
        return {"vision": vision, "language": language}


def layers_read(n: int, n_read: int) -> list[int]:
    """Indices of `n_read` of `n` layers at equal distances from one another and from both ends.

    3, 7, 11, 15, 19 for 5 of 24, as released.
    """
    return sorted({max(round(n * i / (n_read + 1)) - 1, 0) for i in range(1, n_read + 1)})


def unit_blocks(means: Tensor) -> Tensor:
    """tanh of `means` (..., H), scaled to length one; zeros stay zeros."""
    return F.normalize(means.tanh(), dim=-1)


def mean_weights(proxy: Vlm, batch: Batch) -> Tensor:
    """Weights (B, 2, S) float32 that average the states of image and of language tokens.

    All zero where a sample has none.
    """
    ids, position = batch.input_ids, torch.arange(batch.input_ids.shape[1], device=proxy.device)
    token = getattr(proxy.model.config, "image_token_id", None)
    image = ids == (-1 if token is None else token)
    real = position <= batch.last[:, None]
    language = real & ~image & (position >= prompt_length(proxy))
    chosen = torch.stack([image & real, language], dim=1).float()
    return chosen / chosen.sum(dim=2, keepdim=True).clamp_min(1)


def prompt_length(proxy: Vlm) -> int:
    """Tokens that every conversation begins with, whatever is said in it."""
    if proxy not in _prompts:
        records = [Record([Turn("human", text), Turn("gpt", text)]) for text in "01"]
        one, two = (proxy.prepare(record, None).input_ids.tolist() for record in records)
        same = [a == b for a, b in zip(one, two, strict=False)]
        _prompts[proxy] = same.index(False)
    return _prompts[proxy]
