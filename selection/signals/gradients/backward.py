"""Exact gradients of every sample's answer loss by a model's low-rank adapters, in one backward.

Let y = (W + s B A) x be an adapted layer, x_t its input at token t and g_t the derivative of a
sample's loss by its output there. Then

    dL/dB = s sum_t g_t (A x_t)^T     (out, r)
    dL/dA = s sum_t (B^T g_t) x_t^T   (r, in)

Both need x and g alone, so the adapter stays merged into the weights: the model runs as fast as
without one, and these four thin products are what an unmerged adapter costs in a forward and a
backward that keep no gradient at all. Weights are frozen; x is held by reference, once for q, k
and v. The batch's loss is the sum of the samples' losses, and a sample's g does not depend on
another sample. Positions after a sample's last answer token, padding included, have g = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llava.errors import UsageError
from llava.model.lora import LowRank
from llava.vlm.base import Batch, StableRows, Vlm
from selection.signals.forward import ROW_CHUNK, supervised_positions
from selection.signals.gradients.sketch import signs

Use = Callable[[str, Tensor], None]
"""Called with a matrix's name and its gradients (B, m, n) float32, which it must not keep."""


def sample_gradients(proxy: Vlm, batch: Batch, adapter: Mapping[str, LowRank], use: Use) -> None:
    """Call `use` once for every matrix of `adapter`, in the order in which backward meets them.

    The loss of a sample is the mean cross-entropy of its answer tokens. Names are
    `layers.0.self_attn.q_proj.lora_A` and so on, for a language model and inside a VLM alike.
    Not to be called in inference mode.
    """
    handles = []
    try:
        for name, factors in adapter.items():
            watch = partial(_watch, name, factors, use)
            handles.append(proxy.decoder.get_submodule(name).register_forward_hook(watch))
        with torch.enable_grad(), StableRows():
            hidden = proxy.hidden(batch)
        hidden.backward(answer_gradient(hidden.detach(), batch.labels, proxy.head))
    finally:
        for handle in handles:
            handle.remove()


def answer_gradient(hidden: Tensor, labels: Tensor, head: nn.Linear) -> Tensor:
    """Derivative of the sum over samples of the mean answer cross-entropy by `hidden` (B, S, H).

    `labels` (B, S); the result is (B, S, H) in the dtype of `hidden`. (softmax - onehot) / n goes
    back through the head, at supervised positions only and `ROW_CHUNK` of them at a time.
    """
    sample, position = supervised_positions(labels)
    targets = labels[sample, position + 1]
    share = 1 / torch.bincount(sample, minlength=len(labels))[sample].float()
    out = torch.zeros_like(hidden)
    for part in torch.arange(len(sample), device=hidden.device).split(ROW_CHUNK):
        where = sample[part], position[part]
        n = len(part)
        # A multiple of 32 rows keeps the matrix products in the kernel that treats rows alike.
        states = F.pad(hidden[where], (0, 0, 0, -n % 32))
        errors = head(states).float().softmax(1)
        errors[torch.arange(n, device=hidden.device), targets[part]] -= 1
        errors[:n] *= share[part, None]
        out[where] = (errors.to(hidden.dtype) @ head.weight)[:n]
    return out


def _watch(
    name: str, factors: LowRank, use: Use, module: nn.Module, inputs: tuple, output: Tensor
) -> None:
    """Forward hook of an adapted layer: have `_use_gradients` called with its output's gradient."""
    if output.dim() != 3:
        raise UsageError(
            f"{name}: its input is {tuple(inputs[0].shape)}, not (samples, tokens, width): the "
            "gradients of its samples cannot be told apart; choose another model"
        )
    if not output.requires_grad:  # the first layers that are adapted: the graph begins here
        output.requires_grad_()
    output.register_hook(partial(_use_gradients, name, factors, use, inputs[0].detach()))


def _use_gradients(name: str, factors: LowRank, use: Use, x: Tensor, g: Tensor) -> None:
    """Both factors' gradients, from the layer's input x (B, S, in) and g (B, S, out)."""
    use(f"{name}.lora_B", outer_sums(g, F.linear(x, factors.down)))
    if factors.up is not None:
        use(f"{name}.lora_A", outer_sums(g @ factors.up, x))


def outer_sums(left: Tensor, right: Tensor) -> Tensor:
    """sum_t left_t right_t^T of each sample, (B, m, n) float32, summed in float32.

    `left` (B, S, m) and `right` (B, S, n).
    """
    if left.is_cuda:
        wider = {} if left.dtype == torch.float32 else {"out_dtype": torch.float32}
        return torch.bmm(left.mT, right, **wider)
    out = left.new_empty(len(left), left.shape[2], right.shape[2], dtype=torch.float32)
    for a, b, one in zip(left.float(), right.float(), out, strict=True):
        torch.mm(a.T, b, out=one)  # batched, they round differently for different batch sizes
    return out


def fresh_adapter(proxy: Vlm, rank: int, seed: int) -> dict[str, LowRank]:
    """An untrained adapter on every linear layer of the decoder: random A, B = 0, s = 1.

    Only B has a gradient then: G^T X A^T, the layer's own weight gradient seen through the `rank`
    random directions in A, which are +-1 / sqrt(in).
    """
    adapter = {}
    for name, module in proxy.decoder.named_modules():
        if isinstance(module, nn.Linear):
            width = module.in_features
            down = signs(f"{seed}/down/{name}", 0, rank * width, module.weight.device)
            scaled = down.view(rank, width) / math.sqrt(width)
            adapter[name] = LowRank(scaled.to(module.weight.dtype), None)
    return adapter
