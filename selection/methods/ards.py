"""ARDS: samples close to the subgroups on which the proxy model is least robust.

Xu Yang, Chen Liu, Ying Wei. Data Selection Matters: Towards Robust Instruction Tuning of Large
Multimodal Models. NeurIPS 2025. https://openreview.net/forum?id=5CFhUQCmkW

    H^ = sum_t A_(L,t) H_t ;  r_i = [H_L ; H^]          signals/forward.py, vectors/stream.py
    C_1 .. C_M : clusters of r, per instruction format  pool/formats.py, vectors/kmeans.py
    x' : symbols, permutation, noise; |l(x) - l(x')|    signals/perturbed.py
    S_m = top_B {x in C_m : |l(x) - l(x')|}             attack_keys, worst_case
    w_m = exp(l_Sm) / sum_m' exp(l_Sm')                 subgroup_weights
    d_iSm = 1/B sum_(j in S_m) cos(r_i, r_j)            similarity
    I(x_i) = sum_m w_m d_iSm                            information

With mean similarity the last two are one matrix-vector product, I(x_i) = (r_i / |r_i|) . v with
v = sum_m w_m mean_(j in S_m) r_j / |r_j| (`direction`): the pool is read once.

Differs from the paper and from the released code: docs/methods/ards.md, with the reasons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from llava.errors import DataError, UsageError, at_least
from llava.lazy import Lazy
from selection.methods.base import Context, Method, Request, Scored, SecondStage
from selection.pool.formats import FORMATS, formats_of, perturbable
from selection.signals.forward import Forward
from selection.signals.perturbed import KIND_CHOICE, Perturbed
from selection.vectors import stream
from selection.vectors.kmeans import cluster_groups

if TYPE_CHECKING:
    from selection.pool.pool import Pool
    from selection.store.store import StoreReader

torch = Lazy("torch")


@dataclass(frozen=True)
class Settings:
    """How ARDS scores; defaults are the paper's."""

    vector: Literal["attention", "last_token"] = "attention"
    """conversation vector: the last token's state joined with the attention-weighted states, or
    the last token's state alone"""
    clustering: bool = True
    """a subgroup per cluster of the pool; false: one subgroup of the largest loss gaps anywhere"""
    clustering_scope: Literal["format", "pool"] = "format"
    """cluster every instruction format on its own, or the pool as a whole"""
    n_clusters: int = 10
    """clusters per format, or of the whole pool with --clustering_scope pool"""
    n_iter: int = 20
    """iterations of k-means"""
    min_cluster_size: int = 3
    """smaller clusters make no subgroup"""
    candidates: int = 200
    """samples drawn from each cluster to be perturbed; 0: all, as in the paper's formula, at the
    price of several more passes over the pool"""
    perturbation: bool = True
    """put the samples that perturbation changes most in the subgroups; false: random ones"""
    subgroup_size: int = 50
    """B, the samples in a worst-case subgroup"""
    symbols: Literal["qwer", "snvf"] = "qwer"
    """symbols that replace A, B, C, D in the attack; evaluate with the other set to test unseen
    ones"""
    max_orders: int = 120
    """orders of the options tried per question; 120 are all orders of five options"""
    diffusion_step: int = 300
    """noise on the image of samples that are not multiple choice, 0..999; 300 keeps 0.98 of it"""
    mcq_criterion: Literal["loss_gap", "failure"] = "loss_gap"
    """multiple choice enters a subgroup by its loss gap, or by a wrong answer under some order"""
    include_perturbed: bool = True
    """the perturbed copies of multiple-choice members are members too"""
    similarity: Literal["mean", "max"] = "mean"
    """similarity of a sample to a subgroup: mean or largest cosine over its members"""
    aggregate: Literal["weighted_sum", "max"] = "weighted_sum"
    """over subgroups: the sum weighted by the softmax of their losses, or the largest similarity"""
    normalize_parts: bool = False
    """bring both parts of the attention vector to length one before they are joined"""
    exclude_subgroups: bool = False
    """members of subgroups cannot be selected"""

    def __post_init__(self) -> None:
        counts = ("n_clusters", "n_iter", "min_cluster_size", "subgroup_size", "max_orders")
        at_least(1, self, *counts)
        if self.candidates < 0 or 0 < self.candidates < self.subgroup_size:
            raise UsageError(
                f"--candidates {self.candidates}: give at least --subgroup_size "
                f"({self.subgroup_size}), or 0 for all samples of a cluster"
            )
        if not 0 <= self.diffusion_step < 1000:
            raise UsageError(f"--diffusion_step {self.diffusion_step}: give a number in 0..999")


def attack_keys(
    gap: np.ndarray,
    is_choice: np.ndarray,
    n_failed: np.ndarray,
    criterion: Literal["loss_gap", "failure"],
) -> np.ndarray:
    """By what candidates are ranked for S_m, (n,) float64, NaN = not a candidate.

    `gap` (n,) is |l(x) - l(x')|, NaN where x has no perturbation. With "failure" multiple-choice
    candidates count by being answered wrongly under at least one order, all alike and before the
    others, as in the released code.
    """
    keys = np.where(np.isfinite(gap), gap, np.nan).astype(np.float64)
    if criterion == "failure":
        keys[is_choice] = np.where(n_failed[is_choice] > 0, np.inf, np.nan)
    return keys


def worst_case(keys: np.ndarray, size: int) -> np.ndarray:
    """S_m: positions of the `size` largest `keys` (n,), largest first, ties by position, no NaN."""
    usable = np.flatnonzero(~np.isnan(keys))
    return usable[np.argsort(-keys[usable], kind="stable")][:size]


def subgroup_weights(losses: np.ndarray) -> np.ndarray:
    """w_m: softmax of the mean losses l_Sm (M,) in nats, (M,) float64."""
    raised = np.exp(losses - np.max(losses))
    return raised / raised.sum()


def similarity(cosines: np.ndarray, starts: np.ndarray, kind: Literal["mean", "max"]) -> np.ndarray:
    """d_iSm (n, M): mean or largest of the `cosines` (n, sum of B_m) to the members of each S_m.

    The members of S_m are the columns from `starts[m]` up to the next start; none is empty.
    """
    if kind == "max":
        return np.maximum.reduceat(cosines, starts, axis=1)
    sizes = np.diff([*starts, cosines.shape[1]])
    return np.add.reduceat(cosines, starts, axis=1) / sizes


def information(
    similarities: np.ndarray, weights: np.ndarray, aggregate: Literal["weighted_sum", "max"]
) -> np.ndarray:
    """I(x_i) (n,) from d_iSm (n, M) and w_m (M,)."""
    if aggregate == "max":
        return similarities.max(axis=1)
    return similarities @ weights


def direction(members: Sequence[torch.Tensor], weights: np.ndarray) -> torch.Tensor:
    """v (D,) float32, with I(x_i) = r_i . v / |r_i| for mean similarity and weighted sum.

    `members` are unit vectors (B_m, D) of each subgroup: v = sum_m w_m mean_j r_j / |r_j|.
    """
    means = np.stack([vectors.numpy().mean(axis=0, dtype=np.float64) for vectors in members])
    # NumPy's sum, unlike a product, does not depend on the number of threads.
    return torch.from_numpy((weights[:, None] * means).sum(axis=0)).float()


def score_store(
    reader: StoreReader,
    columns: Sequence[str],
    members: Sequence[torch.Tensor],
    weights: np.ndarray,
    settings: Settings,
) -> np.ndarray:
    """I(x_i) of every store row, (n,) float64, reading the store once.

    `columns` make up r_i; `members` are the unit vectors (B_m, D) float32 of each subgroup.
    """
    # Where the score is linear in r_i one product gives it, else there is one for every member.
    linear = settings.similarity == "mean" and settings.aggregate == "weighted_sum"
    matrix = direction(members, weights) if linear else torch.cat(list(members)).T.contiguous()
    starts = np.cumsum([0, *(len(vectors) for vectors in members[:-1])])

    def score(_: slice, parts: stream.Parts) -> np.ndarray:
        cosines = stream.cosines(parts, matrix)
        if linear:
            return cosines
        similarities = similarity(cosines, starts, settings.similarity)
        return information(similarities, weights, settings.aggregate)

    # A table of all cosines would be N x members; a chunk's is gone before the next one's comes.
    scores = np.empty(len(reader))
    for part, part_scores in stream.apply(reader, columns, score, settings.normalize_parts):
        scores[part] = part_scores
    return scores


@dataclass(frozen=True)
class Cluster:
    """C_m: its name, how many samples it has, rows (n,) drawn from it in that order, and B."""

    name: str
    n_samples: int
    candidates: np.ndarray
    subgroup_size: int


@dataclass(frozen=True)
class Subgroup:
    """S_m: clean members `rows` (b,), worst first, and the perturbed copies of `copies` (c,)."""

    cluster: Cluster
    rows: np.ndarray
    copies: np.ndarray


class Ards(Method):
    """ARDS: the samples closest to the subgroups on which perturbations hurt the proxy most."""

    Settings = Settings
    presets = {
        "as_released": {
            "normalize_parts": True,
            "mcq_criterion": "failure",
            "similarity": "max",
            "exclude_subgroups": True,
        }
    }

    def signals(self) -> dict[str, Forward]:
        return {"forward": Forward()}

    def second_stage(self, context: Context, rng: np.random.Generator) -> SecondStage:
        """Clusters C_m, and the perturbed signals of the candidates drawn from each."""
        settings = self.settings
        # Keys apart, or the candidates would be the very samples that the centroids were fitted on.
        fit_keys, draw_keys = context.keys(rng), context.keys(rng)
        groups, names = self._groups(context)
        if settings.clustering:
            labels, names, centroids = self._cluster(context, groups, names, fit_keys)
            artefacts, multiple = {"cluster_labels": labels, "centroids": centroids}, 1
        else:  # one cluster that stands for as many as there would have been
            multiple = settings.n_clusters * len(np.unique(groups[groups >= 0]))
            labels, names, artefacts = np.where(groups >= 0, 0, -1), ["pool"], {}
        clusters = self._clusters(labels, names, draw_keys, multiple)
        if not clusters:
            raise DataError(
                f"{context.pool.path}: no cluster has --min_cluster_size "
                f"{settings.min_cluster_size} samples; lower it, or --n_clusters"
            )
        if not settings.perturbation:
            return SecondStage(state=(clusters, artefacts))
        rows = np.sort(np.concatenate([cluster.candidates for cluster in clusters]))
        return SecondStage({"perturbed": Request(self._perturbed, rows)}, (clusters, artefacts))

    def foreseen(self, pool: Pool) -> dict[str, Request]:
        """Candidates of as many clusters as there can be, taken evenly from all that can be."""
        settings = self.settings
        if not settings.perturbation:
            return {}
        formats = formats_of(pool)
        rows = np.flatnonzero(perturbable(pool, formats))
        whole = settings.clustering and settings.clustering_scope == "pool"
        n_groups = 1 if whole else len(np.unique(formats[rows]))
        n_drawn = settings.candidates * settings.n_clusters * n_groups or len(rows)
        chosen = np.linspace(0, len(rows) - 1, min(n_drawn, len(rows))).astype(int)
        return {"perturbed": Request(self._perturbed, rows[chosen])}

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """I(x_i) of the whole pool; artefacts: the clusters, the subgroups and their weights."""
        clusters, artefacts = context.stage.state
        losses = context.values("forward", "nll_mean")
        keys, copy_losses = self._attack(context, rng)
        subgroups = self._subgroups(context, clusters, keys, copy_losses)
        members = self._members(context, subgroups)
        means = [
            np.concatenate([losses[subgroup.rows], copy_losses[subgroup.copies]]).mean()
            for subgroup in subgroups
        ]
        weights = subgroup_weights(np.array(means))
        scores = np.full(len(context.pool), np.nan)
        reader = context.readers["forward"]
        scores[reader.rows] = score_store(reader, self._columns, members, weights, self.settings)
        scores[~np.isfinite(losses)] = np.nan
        if self.settings.exclude_subgroups:
            scores[np.concatenate([subgroup.rows for subgroup in subgroups])] = np.nan
        report = [_describe(*entry, keys) for entry in zip(subgroups, means, weights, strict=True)]
        return Scored(scores, {**artefacts, "subgroups": report}, _notes(clusters, subgroups))

    @property
    def _perturbed(self) -> Perturbed:
        settings = self.settings
        return Perturbed(
            symbols=settings.symbols,
            max_orders=settings.max_orders,
            diffusion_step=settings.diffusion_step,
        )

    @property
    def _columns(self) -> tuple[str, ...]:
        """Columns that make up r_i: [H_L ; H^] or H_L."""
        last_only = self.settings.vector == "last_token"
        return ("last_state",) if last_only else ("last_state", "attention_state")

    def _groups(self, context: Context) -> tuple[np.ndarray, tuple[str, ...]]:
        """Group (N,) that every sample is clustered in, -1 for none, and the names of the groups.

        Only samples that can be perturbed form subgroups.
        """
        pool, formats = context.pool, formats_of(context.pool)
        usable = np.isfinite(context.values("forward", "nll_mean"))
        eligible = usable & perturbable(pool, formats)
        if not self.settings.perturbation and not eligible.any():
            eligible = usable
        if not eligible.any():
            raise DataError(
                f"{pool.path}: no usable sample can be perturbed: none has an image or asks for "
                "an option's letter; --perturbation false draws the subgroups at random"
            )
        if self.settings.clustering_scope == "pool":
            return np.where(eligible, 0, -1), ("pool",)
        return np.where(eligible, formats, -1), FORMATS

    def _cluster(
        self, context: Context, groups: np.ndarray, names: Sequence[str], keys: np.ndarray
    ) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Cluster (N,) int32 of every sample, names of the clusters, and centroids (M, D)."""
        reader = context.readers["forward"]
        rows = reader.rows
        clustered = cluster_groups(
            reader,
            self._columns,
            groups[rows],
            keys[rows],
            self.settings.n_clusters,
            self.settings.n_iter,
            normalize_parts=self.settings.normalize_parts,
        )
        labels = np.full(len(groups), -1, np.int32)
        labels[rows] = clustered.labels
        owners = clustered.owner  # ascending: clusters are numbered from 0 within each group
        numbers = np.arange(len(owners)) - np.searchsorted(owners, owners)
        named = [f"{names[owner]}_{m}" for owner, m in zip(owners, numbers, strict=True)]
        return labels, named, clustered.centroids

    def _clusters(
        self, labels: np.ndarray, names: Sequence[str], keys: np.ndarray, multiple: int
    ) -> list[Cluster]:
        """Clusters large enough for a subgroup, each with candidates drawn by the smallest keys."""
        clusters = []
        for label, name in enumerate(names):
            members = np.flatnonzero(labels == label)
            if len(members) >= self.settings.min_cluster_size:
                n_drawn = self.settings.candidates * multiple or len(members)
                drawn = members[np.argsort(keys[members], kind="stable")[:n_drawn]]
                size = self.settings.subgroup_size * multiple
                clusters.append(Cluster(name, len(members), drawn, size))
        return clusters

    def _attack(self, context: Context, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """By pool row (N,): what ranks the candidates, and the losses of copies that may join."""
        if not self.settings.perturbation:
            return context.keys(rng), np.full(len(context.pool), np.nan)
        gap, kind, n_failed, losses = (
            context.values("perturbed", name)
            for name in ("gap", "kind", "n_failed", "loss_perturbed")
        )
        keys = attack_keys(gap, kind == KIND_CHOICE, n_failed, self.settings.mcq_criterion)
        joins = (kind == KIND_CHOICE) & self.settings.include_perturbed & np.isfinite(losses)
        return keys, np.where(joins, losses, np.nan)

    def _subgroups(
        self,
        context: Context,
        clusters: list[Cluster],
        keys: np.ndarray,
        copy_losses: np.ndarray,
    ) -> list[Subgroup]:
        """S_m of every cluster that has one. Raises DataError when none has."""
        subgroups = []
        for cluster in clusters:
            worst = worst_case(keys[cluster.candidates], cluster.subgroup_size)
            if len(worst):
                rows = cluster.candidates[worst]
                subgroups.append(Subgroup(cluster, rows, rows[~np.isnan(copy_losses[rows])]))
        if not subgroups:
            raise DataError(
                f"{context.pool.path}: none of {sum(len(c.candidates) for c in clusters)} "
                "candidates changed under perturbation (no image, and no multiple choice that "
                "could be read); --perturbation false draws the subgroups at random"
            )
        return subgroups

    def _members(self, context: Context, subgroups: list[Subgroup]) -> list[torch.Tensor]:
        """Unit vectors (B_m, D) float32 of the members of every subgroup, clean ones first."""
        members = {
            "forward": [subgroup.rows for subgroup in subgroups],
            "perturbed": [subgroup.copies for subgroup in subgroups],
        }
        parts, normalize = [], self.settings.normalize_parts
        for signal, rows in members.items():
            if any(map(len, rows)):
                reader = context.readers[signal]
                positions = np.searchsorted(reader.rows, np.concatenate(rows))
                vectors = stream.unit(stream.take(reader, self._columns, positions, normalize))
                parts.append(vectors.split(list(map(len, rows))))
        return [torch.cat(vectors) for vectors in zip(*parts, strict=True)]


def _describe(subgroup: Subgroup, loss: float, weight: float, keys: np.ndarray) -> dict:
    """One entry of the artefact `subgroups`."""
    cluster = subgroup.cluster
    return {
        "name": cluster.name,
        "n_samples": cluster.n_samples,
        "n_candidates": len(cluster.candidates),
        "loss": float(loss),
        "weight": float(weight),
        "rows": subgroup.rows.tolist(),
        "keys": [float(key) if np.isfinite(key) else None for key in keys[subgroup.rows]],
        "perturbed_rows": subgroup.copies.tolist(),
    }


def _notes(clusters: list[Cluster], subgroups: list[Subgroup]) -> tuple[str, ...]:
    short = sum(len(subgroup.rows) < subgroup.cluster.subgroup_size for subgroup in subgroups)
    silent = len(clusters) - len(subgroups)
    notes = {
        f"{silent} clusters have nothing to perturb": silent,
        f"{short} of {len(subgroups)} subgroups have fewer members than asked for": short,
    }
    return tuple(note for note, n in notes.items() if n)
