"""Training of a scorer: one step a batch, on the losses that a target model had on it.

The same step serves co-training (the losses come from the model being trained) and the decoupled
mode (they were recorded). Every process of a run makes the same step on the whole batch, so the
weights do not depend on how many there are, and no gradient has to be exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llava.errors import NonFiniteError
from selection.methods.coido.losses import (
    batch_weights,
    diversity_loss,
    importance_loss,
    total_loss,
)
from selection.methods.coido.scorer import Scorer
from selection.methods.coido.settings import Objective

WARMUP = 0.03


@dataclass(frozen=True)
class Recipe:
    """How a scorer is trained; the paper's values, for `n_steps` steps."""

    n_steps: int
    learning_rate: float = 2e-5
    objective: Objective = "uncertainty"
    balance: float = 0.5


class Fitter:
    """A scorer in training: Adam without weight decay, 3 % warm-up, cosine decay to zero."""

    def __init__(self, scorer: Scorer, recipe: Recipe) -> None:
        self.scorer, self.recipe = scorer, recipe
        self.log_sigma = torch.zeros(2, requires_grad=True)
        parameters = [*scorer.network.parameters(), self.log_sigma]
        self.optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate)
        self.n_done = 0

    @torch.no_grad()
    def weights(self, rows: Tensor) -> Tensor:
        """w (B,) of a batch of assembled `rows` (B, F), as the scorer stands."""
        return batch_weights(self.scorer.network(rows))

    def step(self, rows: Tensor, cross_entropy: Tensor, labels: Tensor) -> tuple[float, float]:
        """One step on a batch: `rows` (B, F), losses (B,) in nats, clusters (B,) int64.

        Returns L_I and L_D before it. Raises NonFiniteError when one is not finite.
        """
        weights = batch_weights(self.scorer.network(rows))
        losses = importance_loss(weights, cross_entropy), diversity_loss(weights, labels)
        if not all(bool(torch.isfinite(loss)) for loss in losses):
            raise NonFiniteError(f"the scorer's step {self.n_done + 1}: a loss is not finite")
        total = total_loss(*losses, self.log_sigma, self.recipe.objective, self.recipe.balance)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * schedule(self.n_done, self.recipe.n_steps)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.n_done += 1
        return losses[0].item(), losses[1].item()

    def state(self) -> dict[str, Tensor]:
        """All that a run needs to go on from here."""
        state = {f"network.{k}": v for k, v in self.scorer.network.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"adam.{i}.{name}": value for name, value in moments.items()}
        return {**state, "log_sigma": self.log_sigma.detach(), "done": torch.tensor(self.n_done)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        network = {
            k.removeprefix("network."): v for k, v in state.items() if k.startswith("network.")
        }
        self.scorer.network.load_state_dict(network)
        self.log_sigma.data.copy_(state["log_sigma"])
        self.n_done = int(state["done"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("adam."):
                _, i, name = key.split(".")
                moments.setdefault(int(i), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def schedule(step: int, n_steps: int) -> float:
    """Share of the peak learning rate at `step`, counted from 0: linear warm-up, then cosine."""
    warmup = math.ceil(WARMUP * n_steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, n_steps - warmup))))


def shuffled_batches(
    n: int, batch_size: int, epochs: int, rng: np.random.Generator
) -> Iterator[np.ndarray]:
    """Positions of `n` samples in batches of `batch_size`, every epoch in another order."""
    for _ in range(epochs):
        order = rng.permutation(n)
        for start in range(0, n, batch_size):
            yield order[start : start + batch_size]
