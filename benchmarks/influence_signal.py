"""Influence of whole gradients, without any projection: what the projected ones estimate.

Columns, with g a sample's gradient by all LoRA matrices and u_k the mean of the unit gradients of
target task k:

    influence   (K,)  <g, u_k> / |g|: the mean cosine to the task's samples, since it is linear
    norm              |g|

No gradient is stored: each matrix's part is multiplied with the task's, <G_A, U_A> + <G_B, U_B>,
while the backward goes by. The K task means are held whole, K x 1.3 GB in float32 for LLaVA-7B with
rank 128. It measures what a projection loses; and where no other target task will follow, it needs
no store of gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import msgspec
import numpy as np
import torch
import xxhash
from torch import Tensor

from llava.errors import NonFiniteError
from llava.vlm.base import Prepared, Vlm
from selection.signals.base import Sample, Signal
from selection.signals.gradients.gradients import Gradients, squared_norms
from selection.store.store import Column

_OF_PROJECTIONS = ("dim", "projection")


@dataclass(frozen=True, eq=False)
class Directions:
    """u_k of each of K tasks: (K, m, n) float32 by matrix; `digest` is of what they came from."""

    means: Mapping[str, Tensor]
    n_tasks: int
    digest: str


def mean_unit_gradients(
    gradients: Gradients, proxy: Vlm, tasks: Sequence[Sequence[Prepared]]
) -> Directions:
    """Mean over each task's prepared samples of g / |g|, one sample after the other.

    Raises NonFiniteError when a sample's gradient has no direction.
    """
    means: dict[str, Tensor] = {}
    with torch.inference_mode(False):
        for k, items in enumerate(tasks):
            for item in items:
                found: dict[str, Tensor] = {}
                gradients.compute_each(proxy, [item], found.__setitem__)
                norm = sum(map(squared_norms, found.values())).sqrt().float()
                if not 0 < float(norm) < torch.inf:
                    raise NonFiniteError(
                        f"target task {k}: the gradient of one of its {len(items)} samples has "
                        f"length {float(norm)}; use --dtype float32, or leave the sample out"
                    )
                for name, gradient in found.items():
                    shape = (len(tasks), *gradient.shape[1:])
                    mean = means.setdefault(name, gradient.new_zeros(shape))[k]
                    mean += gradient[0] / (norm * len(items))
    return Directions(means, len(tasks), _digest(gradients, proxy, tasks))


@dataclass(frozen=True, eq=False)
class ExactInfluence(Signal):
    """Exact mean cosine of every sample to each target task."""

    name: ClassVar[str] = "exact_influence"

    gradients: Gradients
    """whose kind, image, rank and seed apply; its projection does not"""
    directions: Directions

    def identity(self) -> dict[str, Any]:
        settings = {**_settings(self.gradients), "directions": self.directions.digest}
        return {"settings": settings, "schema": self.schema}

    def reads(self, proxy: Vlm) -> dict[str, Any]:
        return self.gradients.reads(proxy)

    def columns(self, proxy: Vlm) -> list[Column]:
        shape = (self.directions.n_tasks,)
        return [Column("influence", shape, "float32"), Column("norm", (), "float32")]

    def prepare(self, proxy: Vlm, sample: Sample) -> Prepared:
        return self.gradients.prepare(proxy, sample)

    def compute(self, proxy: Vlm, items: list[Prepared]) -> dict[str, np.ndarray]:
        with torch.inference_mode(False):
            products = torch.zeros(len(items), self.directions.n_tasks, device=proxy.device)
            squares = torch.zeros(len(items), dtype=torch.float64, device=proxy.device)

            def use(name: str, gradient: Tensor) -> None:
                squares.add_(squared_norms(gradient))
                tasks = self.directions.means[name].flatten(1)
                # One product a sample: batched ones round differently for different batch sizes.
                products.add_(torch.stack([tasks @ one for one in gradient.flatten(1)]))

            self.gradients.compute_each(proxy, items, use)
            norm = squares.sqrt().float()
            found = {"influence": products / norm[:, None], "norm": norm}
        return {name: tensor.cpu().numpy() for name, tensor in found.items()}


def _settings(gradients: Gradients) -> dict[str, Any]:
    return {k: v for k, v in asdict(gradients).items() if k not in _OF_PROJECTIONS}


def _digest(gradients: Gradients, proxy: Vlm, tasks: Sequence[Sequence[Prepared]]) -> str:
    """Of the model, the settings and every sample's inputs."""
    digest = xxhash.xxh3_128()
    made_by = [_settings(gradients), gradients.reads(proxy), proxy.identity()]
    digest.update(msgspec.json.encode([made_by, list(map(len, tasks))], order="deterministic"))
    for item in (item for items in tasks for item in items):
        for tensor in (item.input_ids, item.labels, *item.extras.values()):
            digest.update(np.ascontiguousarray(tensor.numpy()))
    return digest.hexdigest()
