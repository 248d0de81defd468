"""Co-training: real training runs of a tiny LLaVA, alone and as two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llava.errors import UsageError
from selection.__main__ import main
from selection.methods.coido import cotrain
from selection.methods.coido.cotrain import Session
from selection.methods.coido.scorer import Scorer
from selection.methods.coido.trajectory import Trajectory
from selection.pool.pool import Pool
from selection.signals.clip_models import checkpoint_content
from tests.tiny_models import save_clip, save_llava, save_pool

N, SHARE = 40, "24"
STEPS = 6  # two epochs of three steps of eight samples


class World:
    """A prepared run of coido, whose subset is trained on, and the command that does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, save_llava(folder / "model")
        clip = save_clip(folder / "clip")
        self.pool, self.images = save_pool(folder / "pool", N)
        where = ["--pool", self.pool, "--images", self.images, "--store", folder / "store"]
        self.where = list(map(str, where))
        flags = ["--clip", clip, "--share", SHARE, "--n_clusters", "4", "--n_neighbours", "4"]
        self.flags = list(map(str, [*flags, "--learning_rate", "1e-3"]))
        prepare = ["--prepare", "True", "--budget", SHARE, "--out", str(folder / "run")]
        main(["select", "coido", *self.where, *self.flags, *prepare])
        self.data = folder / "run/subset.json"

    def argv(self, out: str, *more: str, each: int = 4, accumulated: int = 2) -> list[str]:
        values = {
            "coido_run": self.folder / "run",
            "model_name_or_path": self.model,
            "version": "v1",
            "data_path": self.data,
            "image_folder": self.images,
            "output_dir": self.folder / out,
            "per_device_train_batch_size": each,
            "gradient_accumulation_steps": accumulated,
            "num_train_epochs": 2,
            "learning_rate": 1e-3,
            "model_max_length": 256,
            "disable_tqdm": True,
        }
        return [*(str(w) for k, v in values.items() for w in (f"--{k}", v)), *more]

    def train(self, out: str, *more: str, ranks: int = 1, **batch: int) -> Path:
        launcher = [] if ranks == 1 else ["torch.distributed.run", "--standalone"]
        launcher += [] if ranks == 1 else ["--nproc_per_node", str(ranks), "-m"]
        command = [sys.executable, "-m", *launcher, "selection.methods.coido.cotrain"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [*command, *self.argv(out, *more, **batch)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        return self.folder / out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    checkpoint_content.cache_clear()
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def coupled(world):
    return world.train("coupled")


@pytest.mark.timeout(600)
def test_the_scorer_and_the_model_do_not_depend_on_the_number_of_processes(world, coupled):
    """Eight samples a step: one process, four at a time; two processes, four each.

    Losses are rounded otherwise in other batches, and Adam divides by their gradient's size.
    """
    two = world.train("two", ranks=2, accumulated=1)
    left, right = (load_file(out / "scorer.safetensors") for out in (coupled, two))
    start = Session(world.folder / "run", world.data, "coupled")
    start.start(STEPS)
    fresh = start.fitter.scorer.network.state_dict()
    for name, value in left.items():
        assert (value - right[name]).abs().max() < 2e-4
    assert max((value - fresh[name]).abs().max() for name, value in left.items()) > 1e-3
    one, other = (Trajectory.load(out / "trajectory.safetensors") for out in (coupled, two))
    np.testing.assert_array_equal(one.uid, other.uid)
    np.testing.assert_allclose(one.loss, other.loss, rtol=2e-2)


def test_every_step_records_the_losses_of_its_samples(world, coupled):
    trajectory = Trajectory.load(coupled / "trajectory.safetensors")
    assert trajectory.step.tolist() == np.repeat(np.arange(STEPS), 8).tolist()
    data = Pool.open(world.data)
    for epoch in (slice(0, 24), slice(24, 48)):
        seen = sorted(uid.tobytes() for uid in trajectory.uid[epoch])
        assert seen == sorted(uid.tobytes() for uid in data.uids)
    first, last = trajectory.loss[:24].mean(), trajectory.loss[24:].mean()
    assert np.isfinite(trajectory.loss).all() and last < first


def test_the_scorer_is_that_of_steps_on_the_recorded_losses(world, coupled):
    session = Session(world.folder / "run", world.data, "coupled")
    session.start(STEPS)
    trajectory = Trajectory.load(coupled / "trajectory.safetensors")
    row = {uid.tobytes(): i for i, uid in enumerate(session.uids)}
    for step in range(STEPS):
        mine = trajectory.step == step
        entries = zip(trajectory.uid[mine], trajectory.loss[mine].tolist(), strict=True)
        session.end_step([{row[uid.tobytes()]: loss for uid, loss in entries}])
    for name, value in load_file(coupled / "scorer.safetensors").items():
        again = session.fitter.scorer.network.state_dict()[name]
        torch.testing.assert_close(again, value, atol=1e-6, rtol=0)


def test_decoupled_trains_as_ever_and_its_losses_train_a_scorer(world, coupled):
    out = world.train("decoupled", "--coido_mode", "decoupled")
    assert not (out / "scorer.safetensors").exists()
    plain, weighted = (Trajectory.load(o / "trajectory.safetensors") for o in (out, coupled))
    # the first step is taken before any weight has changed; then the models go different ways
    np.testing.assert_allclose(plain.loss[:8], weighted.loss[:8], rtol=1e-5)
    assert (plain.loss[24:] != weighted.loss[24:]).any()
    files = {
        "--trajectory": out / "trajectory.safetensors",
        "--scorer": coupled / "scorer.safetensors",
    }
    for flag, path in files.items():
        place = ["--out", str(world.folder / flag.strip("-"))]
        main(["select", "coido", *world.where, *world.flags, flag, str(path), *place])
        assert len(json.loads((Path(place[1]) / "subset.json").read_text())) == 12


def test_another_scorer_in_the_same_file_is_another_run(world, coupled, tmp_path):
    scorer = tmp_path / "scorer.safetensors"
    scorer.write_bytes((coupled / "scorer.safetensors").read_bytes())
    flags = [*world.where, *world.flags, "--scorer", str(scorer), "--out", str(tmp_path / "run")]
    main(["select", "coido", *flags])
    main(["select", "coido", *flags])  # finished
    weights = load_file(scorer)
    assembly = Scorer.load(scorer).assembly
    Scorer.new("mlp", assembly, seed=5).save(scorer)
    assert any((load_file(scorer)[name] != weights[name]).any() for name in weights)
    with pytest.raises(UsageError, match="files.scorer"):
        main(["select", "coido", *flags])


def test_an_interrupted_run_goes_on_to_the_same_scorer(world, coupled):
    whole = world.train("whole", "--save_steps", "2", "--save_strategy", "steps")
    part = world.folder / "part"
    flags = ["--save_steps", "2", "--save_strategy", "steps"]
    (whole / "checkpoint-2").rename(world.folder / "kept")
    part.mkdir()
    (world.folder / "kept").rename(part / "checkpoint-2")
    world.train("part", *flags)
    for name in ("scorer.safetensors", "trajectory.safetensors"):
        assert (part / name).read_bytes() == (whole / name).read_bytes(), name
    assert (coupled / "scorer.safetensors").read_bytes() == (
        whole / "scorer.safetensors"
    ).read_bytes()


def test_weights_of_a_step_sum_to_the_factor_of_the_importance_loss(world):
    session = Session(world.folder / "run", world.data, "coupled")
    session.start(STEPS)
    session.fitter.log_sigma.data = torch.tensor([0.5, 0.0])
    session.begin_step([5, 3, 9, 3])
    assert sorted(session.share) == [3, 5, 9]
    assert sum(session.share.values()) == pytest.approx(np.exp(-1.0), rel=1e-6)


def test_what_cannot_be_trained_on(world, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="is no finished run of `select coido`"):
        Session(tmp_path, world.pool, "coupled")
    with pytest.raises(UsageError, match="16 more|15 more"):
        Session(world.folder / "run", world.pool, "coupled")
    monkeypatch.setattr(sys, "argv", ["cotrain"])
    with pytest.raises(UsageError, match="--coido_run"):
        cotrain.main()


def test_the_scorer_file_says_how_it_was_made(coupled):
    assert Scorer.load(coupled / "scorer.safetensors").architecture == "mlp"
