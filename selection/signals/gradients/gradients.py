"""The gradient of each sample's answer loss by the language model's LoRA matrices, projected.

Columns:

    gradient   (dim,)  S g / |g|: the projection of the gradient, over the exact length of g
    norm               |g|, exact: before the projection

The product of two stored gradients is an unbiased estimate of the cosine of the whole ones, with
standard deviation of about 1/sqrt(dim). Half precision adds a relative error of 2^-12 to each
number, far below that. Settings and projections: `selection.signals.gradients.sketch`; the engine:
`selection.signals.gradients.backward`.

A LoRA checkpoint is asked for its own matrices, both A and B of every layer it adapts. Any other
model gets an untrained adapter (`selection.signals.gradients.backward.fresh_adapter`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from llava.errors import UsageError, at_least
from llava.lazy import Lazy
from selection.signals.base import ProxySignal, Sample
from selection.signals.gradients.sketch import PROJECTIONS
from selection.signals.onepass import with_answer
from selection.signals.perturb import noise_generator
from selection.store.store import Column

if TYPE_CHECKING:
    from torch import Tensor

    from llava.model.moments import Moments
    from llava.vlm.base import Prepared, Vlm
    from selection.signals.gradients.backward import Use

torch = Lazy("torch")


@dataclass(frozen=True)
class Gradients(ProxySignal):
    """Projected gradients of the samples, and their exact lengths."""

    name: ClassVar[str] = "gradients"

    dim: int = 5120
    """numbers a gradient is projected to; the estimate of a cosine is off by about 1/sqrt(dim)"""
    projection: Literal["count_sketch", "rademacher", "two_sided"] = "count_sketch"
    """how (sketch.py beside this); the dense rademacher costs `dim` times as much"""
    seed: int = 0
    """seed of the projection, of noise images and of an untrained adapter"""
    kind: Literal["sgd", "adam"] = "sgd"
    """the gradient itself, or the step that Adam would take, from the checkpoint's optimizer.pt"""
    image: Literal["clean", "noise"] = "clean"
    """the sample's image, or Gaussian noise in the place of its pixels"""
    rank: int = 128
    """rank of the untrained adapter that a checkpoint without LoRA is given"""

    def __post_init__(self) -> None:
        if self.projection not in PROJECTIONS:
            raise UsageError(f"projection {self.projection!r}: choose {', '.join(PROJECTIONS)}")
        at_least(1, self, "dim", "rank", prefix="")

    def reads(self, proxy: Vlm) -> dict[str, Any]:
        return {"moments": proxy.moments.digest} if self.kind == "adam" else {}

    def columns(self, proxy: Vlm) -> list[Column]:
        return [Column("gradient", (self.dim,), "float16"), Column("norm", (), "float32")]

    def prepare(self, proxy: Vlm, sample: Sample) -> Prepared:
        item = with_answer(proxy, sample)
        if self.image == "noise" and "pixel_values" in item.extras:
            noise = noise_like(item.extras["pixel_values"], sample.uid, self.seed)
            item = replace(item, extras={**item.extras, "pixel_values": noise})
        return item

    def pass_over(self) -> tuple:
        return "gradients", self.image, self.seed, self.rank

    @staticmethod
    def compute_together(
        signals: Sequence[Gradients], proxy: Vlm, items: list[Prepared]
    ) -> list[dict[str, np.ndarray]]:
        """What each of `signals` computes for `items`, in one forward and backward."""
        with torch.inference_mode(False):
            folds = [_Fold(signal, proxy, len(items)) for signal in signals]

            def use(name: str, gradient: Tensor) -> None:
                for fold in folds:
                    fold.add(name, gradient)

            # One backward serves all: each fold makes of the gradient what its signal stores.
            replace(signals[0], kind="sgd").compute_each(proxy, items, use)
            return [fold.columns() for fold in folds]

    def compute_each(self, proxy: Vlm, items: list[Prepared], use: Use) -> None:
        """Call `use` for every matrix, with the gradients of these samples, or Adam's steps."""
        from selection.signals.gradients.backward import fresh_adapter, sample_gradients

        adapter = proxy.adapter or fresh_adapter(proxy, self.rank, self.seed)
        sample_gradients(
            proxy,
            proxy.collate(items),
            adapter,
            lambda name, gradient: use(name, self.of(proxy, name, gradient)),
        )

    def of(self, proxy: Vlm, name: str, gradient: Tensor) -> Tensor:
        """The gradients of matrix `name`, (B, m, n) float32, or Adam's steps along them."""
        return adam_step(gradient, name, proxy.moments) if self.kind == "adam" else gradient


class _Fold:
    """Projection and length of a batch's gradients, summed over the matrices."""

    def __init__(self, signal: Gradients, proxy: Vlm, n: int) -> None:
        self.signal, self.proxy = signal, proxy
        self.sums = torch.zeros(n, signal.dim, device=proxy.device)
        self.squares = torch.zeros(n, dtype=torch.float64, device=proxy.device)

    def add(self, name: str, gradient: Tensor) -> None:
        signal, matrices = self.signal, self.signal.of(self.proxy, name, gradient)
        self.squares.add_(squared_norms(matrices))
        self.sums.add_(PROJECTIONS[signal.projection](matrices, name, signal.dim, signal.seed))

    def columns(self) -> dict[str, np.ndarray]:
        norm = self.squares.sqrt().float()
        return {
            "gradient": (self.sums / norm[:, None]).half().cpu().numpy(),
            "norm": norm.cpu().numpy(),
        }


def squared_norms(matrices: Tensor) -> Tensor:
    """Sum of squares of each of `matrices` (B, m, n) float32, (B,) float64."""
    return torch.linalg.vector_norm(matrices, dim=(1, 2), dtype=torch.float64).square()


def adam_step(gradient: Tensor, name: str, moments: Moments) -> Tensor:
    """LESS's m' / sqrt(v' + eps) of each sample's gradient, (B, m, n) float32.

    m' = b1 m + (1 - b1) g and v' = b2 v + (1 - b2) g^2: what Adam would do next if it saw this
    sample alone. As in the released code eps stands inside the root and nothing corrects the bias
    of m' and v'; the checkpoint's moments stay as they are.
    """
    (b1, b2), m, v = moments.betas, moments.first[name], moments.second[name]
    second = (b2 * v + (1 - b2) * gradient.square()).add_(moments.eps)
    return (b1 * m + (1 - b1) * gradient).div_(second.sqrt_())


def noise_like(pixels: Tensor, uid: str, seed: int) -> Tensor:
    """Standard normal noise of the shape of `pixels`, a function of `uid` and `seed`."""
    draw = noise_generator(f"{seed}|noise|{uid}")
    return torch.from_numpy(draw.standard_normal(tuple(pixels.shape), np.float32)).to(pixels)
