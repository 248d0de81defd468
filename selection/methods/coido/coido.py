"""CoIDO: a small scorer, trained for importance and diversity at once, says what is needed.

Yichen Yan et al. CoIDO: Efficient Data Selection for Visual Instruction Tuning via Coupled
Importance-Diversity Optimization. NeurIPS 2025.

    features     CLIP image and text, CLIP score, ...    signals/; coido/features.py
    clusters     spectral, M = 20, of the p % drawn      selection/vectors/spectral.py
    scorer       four-layer MLP and others (figure 3)    coido/scorer.py
    w            softmax over the batch                  coido/losses.py: batch_weights
    L_I          sum_i w_i CE_i                 (eq. 1)  importance_loss
    L_D          Var of the cluster means of w  (eq. 2)  diversity_loss
    L            L_I/s_I^2 + L_D/(2 s_D^2) + log s_I s_D (eq. 14)  total_loss
    subset       lowest first within each source         select

The scorer comes from a file (`--scorer`), or is trained here in seconds: on the losses that
co-training recorded (`--trajectory`), or else on the proxy's losses on the drawn samples. Before
co-training, `--prepare` makes what it needs: the drawn samples, their features and clusters.

Differs from the paper and from the released code: docs/methods/coido.md, with the reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llava.errors import DataError, UsageError
from llava.lazy import Lazy
from selection.methods.base import Context, CoTrain, Method, Request, Scored, SecondStage
from selection.methods.coido.features import CLIP, SCORES, SIGNALS, Assembly
from selection.methods.coido.settings import Settings
from selection.methods.random import Random
from selection.methods.random_stratified import RandomStratified
from selection.rules.budget import budget_size
from selection.signals.clip import Clip
from selection.signals.forward import Forward
from selection.signals.image_reward import ImageReward
from selection.signals.judge.settings import NOT_DECIDING, JudgeSettings
from selection.vectors import stream as vectors

if TYPE_CHECKING:
    from selection.methods.coido.fit import Fitter, Recipe
    from selection.methods.coido.scorer import Scorer
    from selection.pool.pool import Pool

torch = Lazy("torch")
fitting = Lazy("selection.methods.coido.fit")
scorers = Lazy("selection.methods.coido.scorer")
trajectories = Lazy("selection.methods.coido.trajectory")


APART = frozenset({"share", "scorer", "trajectory", "prepare", "scorer_batch", *NOT_DECIDING})
"""Settings that do not shape a co-trained scorer; the share does, as the number of samples."""
CHUNK = 1024  # rows that are scored together


@dataclass(frozen=True)
class TrainingSet:
    """What a scorer is trained on: pool `rows` (n,), their features (n, F), their clusters (n,)."""

    rows: np.ndarray
    assembly: Assembly
    features: np.ndarray
    labels: np.ndarray

    def artefacts(self) -> dict[str, np.ndarray]:
        return {"training_rows": self.rows, "training_clusters": self.labels}

    def __str__(self) -> str:
        sizes = np.bincount(self.labels)
        return f"{len(self.rows)} samples, {len(sizes)} clusters of {sizes.min()} to {sizes.max()}"


class Coido(Method):
    """Lowest score of a scorer that was trained for importance and diversity at once."""

    Settings = Settings

    def signals(self) -> dict[str, Any]:
        signals: dict[str, Any] = {"clip": Clip(self.settings.clip)}
        if self.settings.image_reward:
            weights, words = self.settings.image_reward, self.settings.image_reward_tokenizer
            signals["image_reward"] = ImageReward(weights, words)
        if self.settings.judge_url:
            signals["judge"] = _judge(self.settings)
        return signals

    def training(self) -> tuple[CoTrain, ...]:
        """The scorer beside a LoRA on the drawn samples, unless it or its losses are given."""
        settings = self.settings
        if settings.scorer or settings.trajectory or settings.prepare:
            return ()
        return (
            CoTrain(
                module="selection.methods.coido.cotrain",
                preparing={"prepare": True, "budget": settings.share},
                prepared_flag="coido_run",
                result="scorer.safetensors",
                fills="scorer",
                flags={"num_train_epochs": settings.epochs},
                paper_flags={"learning_rate": 2e-5},
                paper_batch=64,
                apart=APART,
            ),
        )

    def files(self) -> dict[str, str]:
        return self.settings.files()

    def foreseen(self, pool: Pool) -> dict[str, Request]:
        return self._losses(Context(pool))

    def second_stage(self, context: Context, rng: np.random.Generator) -> SecondStage:
        """The proxy's losses on the drawn samples, where they are what the scorer learns from."""
        return SecondStage(self._losses(context))

    def _losses(self, context: Context) -> dict[str, Request]:
        settings = self.settings
        if settings.scorer or settings.trajectory or settings.prepare:
            return {}
        rows = drawn(context, self._share(context.pool), settings.draw)
        return {"forward": Request(Forward(), np.sort(rows))}

    def score(self, context: Context, rng: np.random.Generator) -> Scored:
        """Minus the scorer's logit, so that the most wanted sample is highest."""
        if self.settings.prepare:
            return self._prepared(context, rng)
        artefacts: dict[str, Any] = {}
        if self.settings.scorer:
            scorer = scorers.Scorer.load(self.settings.scorer)
            notes = [f"scorer of {self.settings.scorer}"]
        else:
            scorer, artefacts, notes = self._fit(context, rng)
        absent = [name for name in SCORES if name not in scorer.assembly.scores]
        if absent and self.settings.features != "clip":
            notes.append(f"without {', '.join(absent)}")
        scores = -score_pool(scorer, context, self._scores(context, scorer.assembly.scores))
        scores[unusable(context)] = np.nan
        return Scored(scores, artefacts, tuple(notes))

    def select(self, context: Context, scores: np.ndarray, k: int) -> np.ndarray:
        """The best of every source, sources in proportion, rounded by largest remainders."""
        if self.settings.prepare:
            return super().select(context, scores, k)
        return RandomStratified().select(context, scores, k)

    def _fit(
        self, context: Context, rng: np.random.Generator
    ) -> tuple[Scorer, dict[str, Any], list[str]]:
        """A scorer trained on the drawn samples, what to keep of it, and what to say."""
        settings = self.settings
        # Batches are those of the steps that were recorded, or shuffled ones of the proxy's losses;
        # one sample alone teaches nothing, as its softmax is 1.
        rows = drawn(context, self._share(context.pool), settings.draw)
        if settings.trajectory:
            batches, rows = trajectories.Trajectory.load(settings.trajectory).on(context.pool, rows)
        else:
            rows = rows[~np.isnan(context.values("forward", "nll_mean")[rows])]
            losses = context.values("forward", "nll_mean")[rows]
            order = list(
                fitting.shuffled_batches(len(rows), settings.scorer_batch, settings.epochs, rng)
            )
            batches = [(places, losses[places]) for places in order if len(places) > 1]
        # The seed is drawn after the batches are: in another order it would be another scorer.
        data, training = self._training_set(context, rows, rng)
        scorer = scorers.Scorer.new(settings.architecture, data.assembly, training["seed"])
        recipe = fitting.Recipe(len(batches), **training["recipe"])
        curve, fitter = fit(scorer, recipe, data.features, data.labels, batches)
        sigma = fitter.log_sigma.detach().exp().tolist()
        artefacts = {
            **data.artefacts(),
            "training": {**training, "recipe": asdict(recipe), "sigma": sigma},
            "losses": curve,
            "scorer": scorer.packed({"sigma": sigma, **asdict(recipe)}),
        }
        return scorer, artefacts, [f"scorer trained on {data} in {len(batches)} steps"]

    def _prepared(self, context: Context, rng: np.random.Generator) -> Scored:
        """The random numbers that draw the samples, and what co-training needs of these."""
        rows = drawn(context, context.k, self.settings.draw)
        data, training = self._training_set(context, rows, rng)
        artefacts = {**data.artefacts(), "training": training}
        return Scored(draw_keys(context, self.settings.draw), artefacts, (f"to train on: {data}",))

    def _training_set(
        self, context: Context, rows: np.ndarray, rng: np.random.Generator
    ) -> tuple[TrainingSet, dict[str, Any]]:
        """Features and clusters of pool `rows` (n,), and how a scorer is trained on them."""
        settings = self.settings
        signals = () if settings.features == "clip" else self.signals()
        names = tuple(name for name in SCORES if SIGNALS[name] in signals)
        scores = {n: values[rows] for n, values in self._scores(context, names).items()}
        reader = context.readers["clip"]
        width = 0 if settings.features == "scores" else reader.columns[CLIP[0]].shape[0]
        assembly = Assembly.fit(width, scores)
        positions = np.searchsorted(reader.rows, rows)
        features = assembly.rows([reader.take(name, positions) for name in CLIP], scores)
        labels = clusters(features, settings.n_clusters, settings.n_neighbours)
        training = {
            "architecture": settings.architecture,
            "assembly": asdict(assembly),
            "seed": int(rng.integers(2**31)),
            "recipe": {
                "learning_rate": settings.learning_rate,
                "objective": settings.objective,
                "balance": settings.balance,
            },
        }
        return TrainingSet(rows, assembly, features, labels), training

    def _scores(self, context: Context, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Scores by pool row, (N,) each; UsageError for one that this run has no signal of."""
        for name in names:
            if SIGNALS.get(name) not in context.readers:
                raise UsageError(f"--scorer {self.settings.scorer}: reads {name}; {_REMEDY[name]}")
        return {name: context.values(SIGNALS[name], name) for name in names}

    def _share(self, pool: Pool) -> int:
        return budget_size(self.settings.share, len(pool))


_REMEDY = {
    "clip_score": "it comes with CLIP",
    "image_reward": "give --image_reward",
    "llm_score": "give --judge_url",
}


def drawn(context: Context, n: int, draw: int) -> np.ndarray:
    """Pool rows of the p %, in the order of their random keys, not of the pool, (n,) int64."""
    keys = draw_keys(context, draw)
    n_usable = int(np.count_nonzero(~np.isnan(keys)))
    if min(n, n_usable) < 2:
        raise DataError(f"{n} samples drawn of {n_usable} usable ones; a scorer needs more")
    return np.argsort(-keys, kind="stable")[: min(n, n_usable)]


def draw_keys(context: Context, draw: int) -> np.ndarray:
    """The scores of `select random --seed DRAW`, (N,) float64; NaN for unusable samples."""
    keys = Random().run(context, draw, dict).scores
    keys[unusable(context)] = np.nan
    return keys


def unusable(context: Context) -> np.ndarray:
    """Rows that a signal of the whole pool could not be computed for, (b,) int64."""
    readers = (reader for name, reader in context.readers.items() if name != "forward")
    return np.unique(np.concatenate([np.zeros(0, np.int64), *(r.bad_rows for r in readers)]))


def clusters(features: np.ndarray, n_clusters: int, n_neighbours: int) -> np.ndarray:
    """Spectral clusters of assembled rows (n, F), (n,) int32."""
    try:
        from selection.vectors.spectral import spectral_clusters
    except ImportError as error:
        raise UsageError(f"coido: {error}; pip install pyamg") from error
    return spectral_clusters(features, n_clusters, n_neighbours)


def fit(
    scorer: Scorer,
    recipe: Recipe,
    features: np.ndarray,
    labels: np.ndarray,
    batches: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, Fitter]:
    """Train on `batches` of (positions in `features` (n, F), losses in nats), in their order.

    Returns L_I and L_D of every step, (steps, 2) float64, and the fitter.
    """
    fitter, curve = fitting.Fitter(scorer, recipe), []
    rows, members = torch.from_numpy(features), torch.from_numpy(labels).long()
    for places, losses in batches:
        where = torch.from_numpy(places)
        curve.append(fitter.step(rows[where], torch.tensor(losses).float(), members[where]))
    return np.array(curve), fitter


def score_pool(scorer: Scorer, context: Context, scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Logits by pool row (N,) float64, reading the CLIP features once; NaN where there are none."""
    reader = context.readers["clip"]
    rows, logits = reader.rows, np.full(len(context.pool), np.nan)

    def score(part: slice, halves: vectors.Parts) -> np.ndarray:
        part_scores = {name: values[rows[part]] for name, values in scores.items()}
        assembled = scorer.assembly.rows([half.numpy() for half in halves], part_scores)
        return scorer.score(torch.from_numpy(assembled)).double().numpy()

    for part, part_logits in vectors.apply(reader, CLIP, score, size=CHUNK):
        logits[rows[part]] = part_logits
    return logits


def _judge(settings: JudgeSettings) -> Any:
    try:
        from selection.signals.judge.judge import Judge
    except ImportError as error:
        raise UsageError(f"--judge_url: {error}; pip install openai tenacity") from error
    names = JudgeSettings.__dataclass_fields__
    return Judge(**{name: getattr(settings, name) for name in names})
