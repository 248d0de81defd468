"""`python -m selection.methods.coido.cotrain`: CoIDO's scorer trained beside the target model.

    --coido_run DIR   a run of `select coido --prepare True`: drawn samples, features and clusters
    --coido_mode      coupled: the model minimises L_I of equation 14 too, each sample's loss
                      weighted by w; decoupled: it is trained as ever, its losses are recorded

and the flags of `llava.train`, whose `--data_path` is the subset.json of that run. Into
`--output_dir` go the model, `trajectory.safetensors` and, coupled, `scorer.safetensors`.

The batch over which scores are a softmax is that of an optimizer step: all processes, all
accumulated batches. Each process knows all features and makes the scorer's step on the whole batch,
once the step's losses are exchanged; the model's gradient gets the weights its samples had before.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import TrainerCallback

from llava import ranks
from llava.errors import UsageError
from llava.files import atomic_write
from llava.launch import process
from llava.train.__main__ import train
from llava.train.arguments import parse
from llava.train.trainer import LlavaTrainer
from selection.methods.coido.features import CLIP, SIGNALS, Assembly
from selection.methods.coido.fit import Fitter, Recipe
from selection.methods.coido.losses import total_loss
from selection.methods.coido.scorer import Scorer
from selection.methods.coido.trajectory import Trajectory
from selection.output.folder import unseal
from selection.pool.pool import Pool
from selection.store.store import StoreReader

Mode = Literal["coupled", "decoupled"]
STATE = "coido.safetensors"


class Session:
    """What CoIDO adds to a training run: features, the scorer in training, recorded losses.

    Rows are those of the training data.
    """

    def __init__(self, run: str | Path, data_path: str | Path, mode: Mode) -> None:
        # The run that prepared, and how it says the scorer is to be trained.
        run = Path(run)
        manifest = unseal(run / "manifest.json")
        if manifest is None or manifest["method"]["name"] != "coido":
            raise UsageError(f"--coido_run {run}: is no finished run of `select coido`")
        try:
            training = json.loads((run / "artefacts/training.json").read_text(encoding="utf-8"))
        except OSError:
            raise UsageError(f"--coido_run {run}: was given its --scorer, none to train") from None
        self.mode, self.manifest, self.training = mode, manifest, training
        # Its rows are those of the pool; the training data may be some of them, in any order, and
        # are told by their uids.
        pool = Pool.open(manifest["pool"]["path"], limit=manifest["pool"]["n"])
        drawn = np.load(run / "artefacts/training_rows.npy", allow_pickle=False)
        labels = np.load(run / "artefacts/training_clusters.npy", allow_pickle=False)
        self.assembly = Assembly.of(training["assembly"])
        data = Pool.open(data_path)
        position = {pool.uid(row): i for i, row in enumerate(drawn.tolist())}
        unknown = [row for row in range(len(data)) if data.uid(row) not in position]
        if unknown:
            raise UsageError(
                f"--data_path {data_path}: row {unknown[0]} and {len(unknown) - 1} more are not "
                f"among the samples that {run} drew; give {run}/subset.json"
            )
        places = np.array([position[data.uid(row)] for row in range(len(data))])
        self.uids = data.uids
        self.labels = torch.from_numpy(labels[places]).long()
        self.features = torch.from_numpy(self._features(drawn[places]))
        self.steps: list[dict[int, float]] = []
        self.recorded: dict[int, float] = {}
        self.share: dict[int, float] = {}
        self.fitter: Fitter | None = None

    def _features(self, rows: np.ndarray) -> np.ndarray:
        """Assembled features of pool `rows` (n,), from the stores of the run."""

        def read(signal: str, column: str) -> np.ndarray:
            reader = StoreReader.open(self.manifest["signals"][signal]["folder"])
            return reader.take(column, np.searchsorted(reader.rows, rows))

        clip = [read("clip", name) for name in CLIP] if self.assembly.clip_width else []
        return self.assembly.rows(clip, {n: read(SIGNALS[n], n) for n in self.assembly.scores})

    def identity(self) -> dict[str, Any]:
        """What decides the run beside the flags of training (promise P10)."""
        signals = {k: v["fingerprint"] for k, v in self.manifest["signals"].items()}
        return {"coido": {"mode": self.mode, "training": self.training, "signals": signals}}

    def start(self, n_steps: int) -> None:
        """Begin with an untrained scorer, for a run of `n_steps` optimizer steps."""
        recipe = Recipe(**{**self.training["recipe"], "n_steps": n_steps})
        scorer = Scorer.new(self.training["architecture"], self.assembly, self.training["seed"])
        self.fitter = Fitter(scorer, recipe)

    def begin_step(self, rows: Sequence[int]) -> None:
        """Weigh the samples of a step; `rows` are those of all processes, in any order."""
        # In the order of rows, not of processes: sums have the same bits however many there are.
        batch = sorted(set(rows))
        weights = self.fitter.weights(self.features[batch]) * self._factor()
        self.share = dict(zip(batch, weights.tolist(), strict=True))

    def _factor(self) -> Tensor:
        """What L_I counts in the total loss: 1 / s_I^2, as s_I stands."""
        recipe, one, none = self.fitter.recipe, torch.ones(()), torch.zeros(())
        of = functools.partial(
            total_loss,
            log_sigma=self.fitter.log_sigma.detach(),
            objective=recipe.objective,
            balance=recipe.balance,
        )
        return of(one, none) - of(none, none)

    def end_step(self, parts: Sequence[dict[int, float]]) -> None:
        """Train the scorer on the losses of all processes, and record them."""
        losses = {row: loss for part in parts for row, loss in part.items()}
        batch = sorted(losses)
        if self.mode == "coupled" and len(batch) > 1:
            values = torch.tensor([losses[row] for row in batch])
            self.fitter.step(self.features[batch], values, self.labels[batch])
        self.steps.append({row: losses[row] for row in batch})
        self.recorded = {}

    def trajectory(self) -> Trajectory:
        """All losses so far."""
        rows = [row for step in self.steps for row in step]
        losses = [loss for step in self.steps for loss in step.values()]
        numbers = np.repeat(np.arange(len(self.steps)), [len(step) for step in self.steps])
        return Trajectory(self.uids[rows], np.array(losses, np.float32), numbers)

    def save(self, folder: Path) -> None:
        """Write the results."""
        self.trajectory().save(folder / "trajectory.safetensors")
        if self.mode == "coupled":
            about = {"sigma": self.fitter.log_sigma.detach().exp().tolist(), **self.identity()}
            self.fitter.scorer.save(folder / "scorer.safetensors", about)

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        rows = [(row, i) for i, step in enumerate(self.steps) for row in step]
        losses = [loss for step in self.steps for loss in step.values()]
        return {
            **self.fitter.state(),
            "rows": torch.tensor(rows, dtype=torch.int64).reshape(-1, 2),
            "losses": torch.tensor(losses, dtype=torch.float64),
        }

    def restore(self, state: dict[str, Tensor], n_steps: int) -> None:
        """Put back what `state` gave after `n_steps` steps."""
        self.fitter.restore(state)
        self.steps = [{} for _ in range(n_steps)]
        for (row, step), loss in zip(state["rows"].tolist(), state["losses"].tolist(), strict=True):
            self.steps[step][row] = loss


class CoTrainer(LlavaTrainer):
    """Trainer that tells a session the loss of every sample, and weights it where coupled."""

    def __init__(self, *, session: Session, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.args.packing:
            raise UsageError("--packing joins samples, and CoIDO needs the loss of each; drop it")
        self.session = session
        self.add_callback(_Steps(self))

    def get_batch_samples(self, *args: Any) -> tuple[list, int]:
        batches = super().get_batch_samples(*args)
        self.session.begin_step([row for part in ranks.gathered(self.step_rows) for row in part])
        return batches

    def reduced(
        self,
        losses: Tensor,
        sample: Tensor,
        rows: Sequence[int],
        n_tokens: Tensor | int,
    ) -> Tensor:
        if not self.model.training:
            return super().reduced(losses, sample, rows, n_tokens)
        counts = torch.bincount(sample, minlength=len(rows))
        means = torch.zeros(len(rows), device=losses.device).index_add(0, sample, losses)
        means = means / counts.clamp_min(1)
        told = zip(rows, means.tolist(), counts.tolist(), strict=True)
        self.session.recorded |= {row: mean for row, mean, n in told if n}
        if self.session.mode == "decoupled":
            return super().reduced(losses, sample, rows, n_tokens)
        shares = torch.tensor([self.session.share[row] for row in rows], device=losses.device)
        return (shares * means).sum()

    def _save_meters(self, folder: Path) -> None:
        super()._save_meters(folder)
        if self.args.should_save:
            atomic_write(folder / STATE, save(self.session.state()))


class _Steps(TrainerCallback):
    def __init__(self, trainer: CoTrainer) -> None:
        self.trainer, self.session = trainer, trainer.session

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.start(state.max_steps)
        if self.trainer.resumed_from is not None:
            saved = load_file(Path(self.trainer.resumed_from) / STATE)
            self.session.restore(saved, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.end_step(ranks.gathered(self.session.recorded))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save and state.global_step >= state.max_steps:
            self.session.save(Path(args.output_dir))


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--coido_run")
    parser.add_argument("--coido_mode", choices=Mode.__args__, default="coupled")
    flags, argv = parser.parse_known_args(sys.argv[1:])
    if flags.coido_run is None:
        raise UsageError("--coido_run: name the folder of a run of `select coido --prepare True`")
    arguments = parse(argv)
    session = Session(flags.coido_run, arguments.data.data_path, flags.coido_mode)
    train(arguments, functools.partial(CoTrainer, session=session), session.identity())


if __name__ == "__main__":
    process(main)
