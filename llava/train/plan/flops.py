"""Floating-point operations of a training step. Pure functions; a multiply-add counts as two.

Counted are matrix products, as `torch.utils.flop_counter` and the literature do; norms, softmax
and the optimizer are below one percent. Attention counts whole L x L squares, although causal
kernels skip nearly half of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llava.train.plan.devices import Device
from llava.train.plan.lengths import Batch
from llava.train.plan.outline import Matrices, Outline

ATTENTION_BACKWARD = 2.5
"""Of the forward: four products for the gradients, one to recompute the scores, against two. """


@dataclass(frozen=True)
class Flops:
    """FLOPs of some batches by part."""

    language_model: float
    adapters: float
    attention: float
    output_layer: float
    projector: float
    vision_tower: float
    recomputed: float
    """The language model's layers once more, for gradient checkpointing."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def linear(matrices: Matrices, n_positions: int, needs_input_gradient: bool) -> float:
    """FLOPs of linear maps, forward and backward.

    y = W x takes 2 |W| a position; the gradient of x, W^T dy, as much; that of W, dy x^T, as much,
    but only where W is trained. A frozen map below the first trained weight has no backward at all.
    """
    backward = matrices.all * needs_input_gradient + matrices.trained
    return 2.0 * n_positions * (matrices.all + backward)


def attention(n_rows: int, length: int, width: int, n_layers: int) -> float:
    """Forward FLOPs of Q K^T and P V: each takes 2 L^2 times the heads' total width, per row."""
    return 4.0 * n_rows * length**2 * width * n_layers


def vision_tower(outline: Outline, n_images: int) -> float:
    """Forward only: the tower is frozen and nothing below it is trained."""
    tower = outline.tower
    if tower is None:
        return 0.0
    n_positions = n_images * tower.n_positions
    maps = linear(outline.matrices["vision tower"], n_positions, needs_input_gradient=False)
    patches = 2.0 * n_images * (tower.n_positions - 1) * tower.patch_weights
    return maps + patches + attention(n_images, tower.n_positions, tower.hidden, tower.n_layers)


def projector(outline: Outline, n_images: int) -> float:
    """Like every linear map, except that the first needs no gradient of its input."""
    tower = outline.tower
    if tower is None:
        return 0.0
    n_positions = n_images * outline.n_image_tokens
    matrices = outline.matrices["projector"]
    first = tower.hidden * outline.hidden
    trains = matrices.trained > 0
    saved = 2.0 * n_positions * first * trains
    return linear(matrices, n_positions, needs_input_gradient=trains) - saved


def recomputed(outline: Outline, n_positions: int, squares: float) -> float:
    """Gradient checkpointing runs the layers' forward a second time, up to the input of the last
    map: no backward needs what that map puts out, except that of an adapter beside it."""
    matrices = outline.matrices["language model"].all + outline.matrices["adapters"].all
    if not outline.matrices["adapters"].all:
        matrices -= outline.intermediate * outline.hidden * outline.n_layers
    return 2.0 * n_positions * matrices + squares


def count(outline: Outline, batch: Batch, checkpointing: bool) -> Flops:
    """FLOPs of one micro-batch, forward and backward.

    A batch without images runs tower and projector on one that changes nothing.
    """
    n_positions = batch.n_positions
    width = outline.n_heads * outline.head_dim
    squares = attention(batch.n_rows, batch.length, width, outline.n_layers)
    layers, adapters = outline.matrices["language model"], outline.matrices["adapters"]
    logits = batch.n_rows * batch.n_logits
    n_images = max(batch.n_images, 1)
    return Flops(
        language_model=linear(layers, n_positions, needs_input_gradient=True),
        adapters=linear(adapters, n_positions, needs_input_gradient=True),
        attention=squares * (1 + ATTENTION_BACKWARD),
        output_layer=linear(outline.matrices["output layer"], logits, needs_input_gradient=True),
        projector=projector(outline, n_images),
        vision_tower=vision_tower(outline, n_images),
        recomputed=recomputed(outline, n_positions, squares) if checkpointing else 0.0,
    )


def add(counts: Sequence[Flops], scale: float) -> Flops:
    """The sum of `counts` times `scale`."""
    parts = zip(*(vars(flops).values() for flops in counts), strict=True)
    return Flops(*(scale * sum(part) for part in parts))


def hours(
    flops: float, device: Device, n_gpus: int, compute_bytes: int, utilisation: float
) -> float:
    """FLOPs / (GPUs x peak x share of the peak that is reached), in hours."""
    return flops / (n_gpus * device.peak(compute_bytes) * utilisation) / 3600
