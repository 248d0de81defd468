"""MLLM-Selector: a random seed set, and draws by how hard the model trained on it finds the rest.

Yiwei Ma et al. MLLM-Selector: Necessity and Diversity-driven High-Value Data Selection for Enhanced
Visual Instruction Tuning. 2025.

    D^n1 : n_1 samples of the pool, uniform            seed_rows
    f_seed : the model fine-tuned on D^n1              the proxy (selection.sh trains it)
    s = sum_t log p(R_t | R_<t, X)          (eq. 3)    necessity; its sign: docs
    N groups of k by the order of s                    group_of
    p_i = softmax(s / tau) inside a group   (eq. 4)    keys, effective_size
    n_2 / N of each group, without replacement         largest_remainder, the largest keys
    D^m = D^n1 u D^n2                                  select

Drawing one after another without replacement with probabilities softmax(s / tau) is the same as
taking the largest s / tau + G with independent standard Gumbel G (Yellott 1977, Vieira 2014): no
probability is ever computed, so none can underflow.

Differs from the paper: docs/methods/mllm_selector.md, with the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from llava.errors import UsageError, at_least
from selection.methods.base import Context, Method, Scored, WarmUp
from selection.methods.random import Random
from selection.methods.random_stratified import largest_remainder
from selection.rules.budget import budget_size, top_k
from selection.signals.forward import Forward

Necessity = Literal["nll", "nll_mean", "literal", "perplexity"]
_COLUMNS = {"nll": "nll_sum", "literal": "nll_sum"}


@dataclass(frozen=True)
class Settings:
    """How MLLM-Selector draws; group size and temperature are the paper's."""

    necessity: Necessity = "nll"
    """how much a sample is needed: nll, the negative log-likelihood of its answers; nll_mean, the
    same per answer token; perplexity, exp(nll_mean); literal, equation 3 as printed: -nll"""
    strategy: Literal["grouped", "top", "bottom"] = "grouped"
    """draw from groups of similar necessity, or take the most (top) or least (bottom) needed"""
    group_size: int = 50_000
    """k, samples of neighbouring necessity that form a group"""
    temperature: float = 1.0
    """tau of the softmax inside a group; a large one draws uniformly"""
    n_seed: str = "0.03"
    """n_1, size of the seed set, part of the budget: a fraction of the pool or a count; the samples
    are those of `select random --budget N_SEED --seed SEED_DRAW`"""
    seed_draw: int = 0
    """seed of the run of `random` that drew the seed set"""

    def __post_init__(self) -> None:
        at_least(1, self, "group_size")
        if not self.temperature > 0:
            raise UsageError(f"--temperature {self.temperature}: give a number above 0")


def necessity(values: np.ndarray, kind: Necessity) -> np.ndarray:
    """s of every sample (N,) float64, larger = more needed.

    `values` (N,) are the sums of the answers' negative log-likelihoods in nats, or their means for
    `nll_mean` and `perplexity`.
    """
    if kind == "perplexity":
        return np.exp(values)
    return -values if kind == "literal" else values


def group_of(scores: np.ndarray, size: int) -> np.ndarray:
    """Group of every sample (N,) int64: 0 holds the `size` largest `scores`, 1 the next; NaN: -1.

    Equal scores are ordered by position. The last group may be smaller.
    """
    groups = np.full(len(scores), -1)
    order = np.argsort(-scores, kind="stable")  # NaN comes last
    ranked = order[: np.count_nonzero(~np.isnan(scores))]
    groups[ranked] = np.arange(len(ranked)) // size
    return groups


def gumbel(uniform: np.ndarray) -> np.ndarray:
    """Standard Gumbel numbers, finite, from `uniform` ones in [0, 1)."""
    return -np.log(-np.log(np.maximum(uniform, 2.0**-54)))


def effective_size(logits: np.ndarray) -> float:
    """1 / sum p^2 of p = softmax(`logits`) (n,): how many samples the draw is really among."""
    weights = np.exp(logits - logits.max())
    return float(weights.sum() ** 2 / (weights**2).sum())


class MllmSelector(Method):
    """A random seed set, and draws by difficulty from groups of similar difficulty."""

    Settings = Settings

    def signals(self) -> dict[str, Any]:
        return {"forward": Forward()}

    def training(self) -> tuple[WarmUp, ...]:
        """The seed model: its proxy has learnt the seed set."""
        return (WarmUp(self.settings.n_seed, self.settings.seed_draw),)

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """s / tau + G for the grouped draw, else s or -s; the seed set is scored too."""
        needed = self._necessity(context)
        logits = needed / self.settings.temperature
        scores = {
            "grouped": logits + gumbel(context.keys(rng)),
            "top": needed,
            "bottom": -needed,
        }[self.settings.strategy]
        seed, groups = self._split(context, needed)
        facts = [
            _describe(needed[groups == g], logits[groups == g]) for g in range(groups.max() + 1)
        ]
        artefacts = {"seed_rows": seed, "necessity": needed, "group": groups, "groups": facts}
        notes = []
        if self.settings.strategy == "grouped" and facts:
            share = min(fact["effective_size"] / fact["n_samples"] for fact in facts)
            notes = [f"{len(facts)} groups; effective sample size at least {share:.1%} of a group"]
        return Scored(scores, artefacts, tuple(notes))

    def select(self, context: Context, scores: np.ndarray, k: int) -> np.ndarray:
        """The seed set, and from each group its share of the other samples by the largest score."""
        usable = ~np.isnan(scores)
        needed = np.where(usable, self._necessity(context), np.nan)
        seed, groups = self._split(context, needed)
        if len(seed) >= k:
            raise UsageError(
                f"--n_seed {self.settings.n_seed}: the seed set's {len(seed)} samples leave "
                f"nothing of a budget of {k}; lower --n_seed or raise --budget"
            )
        counts = np.bincount(groups[groups >= 0], minlength=1)
        if self.settings.strategy != "grouped" or k - len(seed) > counts.sum():
            rows = top_k(scores, k - len(seed), groups >= 0).rows  # raises if there are too few
            return np.union1d(seed, rows)
        shares = largest_remainder(counts, k - len(seed))
        drawn = [top_k(scores, n, groups == g).rows for g, n in enumerate(shares.tolist())]
        return np.sort(np.concatenate([seed, *drawn]))

    def _necessity(self, context: Context) -> np.ndarray:
        kind = self.settings.necessity
        return necessity(context.values("forward", _COLUMNS.get(kind, "nll_mean")), kind)

    def _split(self, context: Context, needed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the seed set that have a score, ascending, and the groups of all others (N,)."""
        seed = seed_rows(context, self.settings.n_seed, self.settings.seed_draw)
        others = needed.copy()
        others[seed] = np.nan
        return seed[~np.isnan(needed[seed])], group_of(others, self.settings.group_size)


def seed_rows(context: Context, n_seed: str, seed: int) -> np.ndarray:
    """D^n1, (n_1,) ascending: what `select random --budget n_seed --seed seed` chooses."""
    scores = Random().run(context, seed, dict).scores
    return top_k(scores, budget_size(n_seed, len(context.pool))).rows


def _describe(needed: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """One entry of the artefact `groups`."""
    return {
        "n_samples": len(needed),
        "lowest": float(needed.min()),
        "highest": float(needed.max()),
        "effective_size": effective_size(logits),
    }
