"""CoIDO: what is drawn, trained, scored and selected; scorers and trajectories as files."""

import numpy as np
import pytest
import torch

from llava.errors import DataError, UsageError
from selection.methods.base import stream
from selection.methods.coido.coido import Coido, Settings, drawn
from selection.methods.coido.features import CLIP
from selection.methods.coido.fit import Fitter, Recipe
from selection.methods.coido.scorer import Scorer
from selection.methods.coido.trajectory import Trajectory
from selection.methods.random import Random
from selection.methods.random_stratified import largest_remainder

FAST = {"n_clusters": 4, "n_neighbours": 5, "share": "0.4", "learning_rate": 1e-3}


def made(**settings) -> Coido:
    return Coido(Settings(**{**FAST, **settings}))


def saved(run, folder):
    (folder / "scorer.safetensors").write_bytes(run.artefacts["scorer"])
    return str(folder / "scorer.safetensors")


def test_the_drawn_samples_are_those_of_random_in_an_order_of_their_own(world):
    random = Random()
    rows = drawn(world.context(), 60, 3)
    same = random.select(world.context(), world.run(random, seed=3).scores, 60)
    assert sorted(rows) == same.tolist() and rows.tolist() != same.tolist()


def test_the_proxy_sees_the_drawn_samples_only(world):
    method = made()
    assert method.reads_proxy(world.pool) and set(method.signals()) == {"clip"}
    run = world.run(method)
    assert world.requested[0].tolist() == sorted(run.artefacts["training_rows"])
    assert method.foreseen(world.pool)["forward"].rows.tolist() == world.requested[0].tolist()


def test_what_is_prepared_for_co_training_is_what_a_scorer_is_trained_on(world):
    """Another budget and flag, the same samples, clusters and ranges, and no proxy."""
    method = made(prepare=True, draw=3)
    assert not method.reads_proxy(world.pool)
    prepared, trained = world.run(method), world.run(made(draw=3, share="45"))
    for name in ("training_rows", "training_clusters"):
        np.testing.assert_array_equal(prepared.artefacts[name], trained.artefacts[name])
    both = prepared.artefacts["training"], trained.artefacts["training"]
    assert both[0]["assembly"] == both[1]["assembly"]
    subset = method.select(world.context(), prepared.scores, 45)
    assert subset.tolist() == sorted(prepared.artefacts["training_rows"])
    random = Random()
    drawn_by_random = random.select(world.context(), world.run(random, seed=3).scores, 45)
    assert subset.tolist() == drawn_by_random.tolist()


def test_each_source_gives_its_lowest_logits_in_proportion(world):
    method = made()
    run = world.run(method)
    rows = method.select(world.context(), run.scores, 45)
    names, counts = np.unique(world.pool.sources, return_counts=True)
    for name, share in zip(names, largest_remainder(counts, 45), strict=True):
        inside = np.flatnonzero(world.pool.sources == name)
        best = inside[np.argsort(-run.scores[inside], kind="stable")][:share]
        assert sorted(best) == [row for row in rows if world.pool.sources[row] == name]


def test_scores_are_minus_the_scorers_logits_of_the_same_assembly(world, tmp_path):
    method = made()
    run = world.run(method)
    scorer = Scorer.load(saved(run, tmp_path))
    clip = world.context().readers["clip"]
    halves = [clip.column(name) for name in CLIP]
    rows = scorer.assembly.rows(halves, {"clip_score": clip.column("clip_score")})
    logits = scorer.score(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(run.scores, -logits, atol=1e-5)
    fitted = run.artefacts["training"]["assembly"]
    low, high = fitted["lowest"][0], fitted["highest"][0]
    trained_on = clip.column("clip_score")[run.artefacts["training_rows"]]
    assert (low, high) == (np.nanmin(trained_on), np.nanmax(trained_on))
    assert any("without image_reward, llm_score" in note for note in run.notes)


def test_a_scorer_from_a_file_gives_the_scores_it_gave(world, new_world, tmp_path):
    run = world.run(made())
    path = saved(run, tmp_path)
    method = made(scorer=path)
    assert set(method.signals()) == {"clip"}  # the proxy is not needed any more
    np.testing.assert_array_equal(world.run(method).scores, run.scores)
    other = new_world("other", n=90, seed=5)
    scores = other.run(made(scorer=path)).scores
    assert scores.shape == (90,) and np.isfinite(scores).all()


def test_a_trajectory_trains_the_same_scorer_as_its_losses_live(world, tmp_path):
    """Batches and losses recorded elsewhere: the replay is `Fitter.step` by `Fitter.step`."""
    rng, rows = np.random.default_rng(0), drawn(world.context(), 60, 0)
    steps = np.repeat(np.arange(12), 5)
    uid = world.pool.uids[rows]
    trajectory = Trajectory(uid, rng.exponential(size=60).astype(np.float32), steps)
    trajectory.save(tmp_path / "t.safetensors")
    method = made(trajectory=str(tmp_path / "t.safetensors"))
    assert set(method.signals()) == {"clip"}
    run = world.run(method)
    np.testing.assert_array_equal(run.artefacts["training_rows"], rows)
    assert run.artefacts["losses"].shape == (12, 2)
    trained = Scorer.load(saved(run, tmp_path))
    fresh = Scorer.new("mlp", trained.assembly, int(stream(0, "coido", "score").integers(2**31)))
    fitter = Fitter(fresh, Recipe(12, learning_rate=1e-3))
    clip = world.context().readers["clip"]
    halves = [clip.take(name, rows) for name in CLIP]
    features = trained.assembly.rows(halves, {"clip_score": clip.column("clip_score")[rows]})
    labels = torch.from_numpy(run.artefacts["training_clusters"]).long()
    for step in range(12):
        at = torch.arange(60)[steps == step]
        fitter.step(torch.from_numpy(features)[at], torch.tensor(trajectory.loss)[at], labels[at])
    for name, value in fresh.network.state_dict().items():
        torch.testing.assert_close(value, trained.network.state_dict()[name], atol=0, rtol=0)


def test_a_trajectory_of_other_samples_is_refused(world, tmp_path):
    uid = np.zeros((4, 16), np.uint8)
    Trajectory(uid, np.ones(4, np.float32), np.zeros(4, np.int64)).save(tmp_path / "t")
    with pytest.raises(DataError, match="none of the drawn samples"):
        world.run(made(trajectory=str(tmp_path / "t")))
    (tmp_path / "other").write_bytes(b"x")
    with pytest.raises(UsageError, match="is no trajectory"):
        world.run(made(trajectory=str(tmp_path / "other")))


@pytest.mark.parametrize(
    "settings",
    [
        {"features": "clip"},
        {"features": "scores"},
        {"architecture": "transformer"},
        {"architecture": "attention"},
        {"objective": "importance"},
        {"objective": "sum"},
        {"objective": "weighted", "balance": 0.8},
        {"n_clusters": 2},
        {"share": "0.1"},
    ],
    ids=str,
)
def test_every_ablation_of_the_paper_is_a_setting_that_changes_the_scores(world, settings):
    default, other = world.run(made()), world.run(made(**settings))
    assert np.isfinite(other.scores).all()
    assert (default.scores != other.scores).any()


def test_samples_that_are_hard_for_the_proxy_score_highest(world):
    """The proxy's losses follow one direction of the image features: the scorer finds it."""
    direction = np.random.default_rng(0).normal(size=12)
    clip = world.context().readers["clip"]
    along = clip.column("text_features").astype(np.float64) @ direction
    world.forward["nll_mean"] = (1 + 3 * (along > 0)).astype(np.float32)
    method = made(epochs=40, objective="importance", share="0.9")
    scores = world.run(method, block_size=7).scores
    assert scores[along > 0].mean() > scores[along <= 0].mean()


def test_what_a_scorer_reads_and_the_run_has_not(world, tmp_path):
    run = world.run(made())
    scorer = Scorer.load(saved(run, tmp_path))
    assembly = type(scorer.assembly)(12, ("clip_score", "llm_score"), (0.0, 0.0), (1.0, 10.0))
    Scorer.new("mlp", assembly, 0).save(tmp_path / "judged")
    with pytest.raises(UsageError, match="reads llm_score; give --judge_url"):
        world.run(made(scorer=str(tmp_path / "judged")))


def test_image_reward_is_read_where_its_weights_are():
    signal = made(image_reward="ImageReward.pt").signals()["image_reward"]
    assert signal.weights == "ImageReward.pt" and "image_reward" not in made().signals()


def test_a_judge_is_asked_where_there_is_one():
    signal = made(judge_url="http://localhost:1/v1", judge_model="m").signals()["judge"]
    assert signal.server.url == "http://localhost:1/v1" and signal.server.model == "m"


@pytest.mark.parametrize(
    "bad",
    [{"n_clusters": 0}, {"epochs": 0}, {"scorer_batch": 1}, {"balance": 1.5}, {"judge_timeout": 0}],
    ids=str,
)
def test_settings_that_cannot_be(bad):
    with pytest.raises(UsageError, match=f"--{next(iter(bad))}"):
        made(**bad)


@pytest.mark.parametrize("name", ["scorer", "trajectory"])
def test_a_file_that_is_not_there_is_noticed_before_anything_is_computed(name):
    with pytest.raises(UsageError, match=f"--{name} absent: no such file"):
        made(**{name: "absent"})


def test_flags_that_contradict_each_other():
    with pytest.raises(UsageError, match="--scorer needs no --trajectory"):
        made(scorer="a", trajectory="b")
    for given in ("scorer", "trajectory"):
        with pytest.raises(UsageError, match="--prepare comes before"):
            made(prepare=True, **{given: "a"})
