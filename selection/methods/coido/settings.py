"""Flags of CoIDO; importing them needs no model library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llava.errors import UsageError, at_least
from selection.signals.clip import DEFAULT
from selection.signals.judge.settings import JudgeSettings

Architecture = Literal["mlp", "transformer", "attention"]
Objective = Literal["uncertainty", "importance", "sum", "weighted"]


@dataclass(frozen=True)
class Settings(JudgeSettings):
    """How CoIDO scores; defaults are the paper's."""

    scorer: str | None = None
    """file of a trained scorer, of this pool or another; without it one is trained"""
    trajectory: str | None = None
    """file of the losses that co-training recorded, to train the scorer on; without it the proxy's
    own losses serve"""
    clip: str = DEFAULT
    """CLIP checkpoint: a directory or a hub name"""
    image_reward: str | None = None
    """the published weights, ImageReward.pt; without them there is no ImageReward score"""
    image_reward_tokenizer: str = "google-bert/bert-base-uncased"
    """tokenizer of its text encoder: a directory or a hub name"""
    features: Literal["all", "clip", "scores"] = "all"
    """what the scorer reads (table 7)"""
    prepare: bool = False
    """prepare co-training: choose the samples to train on, as `random` does, and cluster them"""
    share: str = "0.2"
    """p, samples to train the scorer on: a fraction of the pool or a count (table 13); with
    --prepare it is --budget"""
    draw: int = 0
    """seed with which they are drawn: they are those of `select random --seed DRAW`"""
    n_clusters: int = 20
    """M, clusters of the drawn samples (table 8)"""
    n_neighbours: int = 30
    """neighbours of a sample in the graph that is clustered, as in the code"""
    architecture: Architecture = "mlp"
    """mlp; transformer: two blocks; attention: self- and cross-attention (table 12)"""
    objective: Objective = "uncertainty"
    """the loss (table 2): uncertainty, equation 14; importance, L_I alone; sum; weighted"""
    balance: float = 0.5
    """lambda of --objective weighted: lambda L_I + (1 - lambda) L_D"""
    learning_rate: float = 2e-5
    """peak learning rate of the scorer"""
    scorer_batch: int = 64
    """samples over which scores are a softmax; a trajectory has batches of its own"""
    epochs: int = 2
    """passes over the drawn samples"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "n_clusters", "n_neighbours", "epochs")
        if self.scorer_batch < 2:
            raise UsageError("--scorer_batch: a softmax over a batch needs at least 2 samples")
        if not 0 <= self.balance <= 1:
            raise UsageError(f"--balance {self.balance}: is a share, 0 to 1")
        if self.scorer and self.trajectory:
            raise UsageError("--scorer needs no --trajectory: it is trained already")
        if self.prepare and (self.scorer or self.trajectory):
            raise UsageError("--prepare comes before --scorer and --trajectory: give one of them")
        for name, path in self.files().items():
            if not Path(path).is_file():
                raise UsageError(f"--{name} {path}: no such file")

    def files(self) -> dict[str, str]:
        """The file of a scorer, or of the losses to train one on, by flag."""
        named = {"scorer": self.scorer, "trajectory": self.trajectory}
        return {name: path for name, path in named.items() if path}
