"""`select` of methods with target tasks, and `compare`: the command line and a real tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import UsageError
from selection.__main__ import main
from selection.output.compare import overlaps, rank_correlations, read_run
from selection.signals.gradients.gradients import Gradients
from selection.store.store import StoreReader
from tests.lora_models import factors, save_lora
from tests.selection.test_run import World, subset, write_pool
from tests.tiny_models import save_llava

SMALL = ["--dim", "64", "--budget", "0.25"]
TITLES = ("kinds/mcq", "kinds/open", "kinds/text", "text")
SIGNALS = ["gradients", *(f"gradients of {title}" for title in TITLES)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    made = World(folder, save_llava(folder / "model"))
    path, _ = write_pool(folder / "wanted", 16)
    records = json.loads(path.read_text())
    (folder / "wanted/text.json").write_text(json.dumps(records[2:8:4]))
    more = [{**record, "id": f"new{i}"} for i, record in enumerate(records[1:14:4])]
    (folder / "wanted/more.json").write_text(json.dumps(more))
    return made


def write_targets(world, name="targets.yaml", more=""):
    path = world.folder / "wanted" / name
    path.write_text(
        "- {name: kinds, data: pool.json, images: images, subtasks: source}\n"
        f"- {{name: text, data: text.json}}\n{more}"
    )
    return str(path)


@pytest.fixture(scope="module")
def icons(world):
    return world.select("icons", *SMALL, "--targets", write_targets(world), method="icons")


def influence(out):
    return np.load(out / "artefacts/influence.npy")


def stores(world, store="store"):
    return {path.name for path in (world.folder / store).iterdir()}


def manifest(out):
    return json.loads((out / "manifest.json").read_text())


def test_icons_is_the_mean_cosine_to_every_task(world, icons):
    signals = {
        name: StoreReader.open(s["folder"]) for name, s in manifest(icons)["signals"].items()
    }
    assert list(signals) == SIGNALS
    vectors = {name: r.column("gradient").astype(np.float64) for name, r in signals.items()}
    kinds = np.concatenate([v for name, v in vectors.items() if "kinds" in name])
    slow = [(vectors["gradients"] @ v.T).mean(1) for v in (kinds, vectors["gradients of text"])]
    np.testing.assert_allclose(influence(icons), np.stack(slow, 1), atol=2e-5)
    tasks = json.loads((icons / "artefacts/tasks.json").read_text())
    assert tasks[0]["subtasks"] == {"mcq": 4, "open": 4, "text": 8}
    assert "chosen by mean rank" in manifest(icons)["notes"][0]


@pytest.fixture
def computed(monkeypatch):
    """Ids of the samples whose gradients are computed."""
    seen, original = [], Gradients.prepare
    monkeypatch.setattr(
        Gradients, "prepare", lambda *a: seen.append(a[2].record.id) or original(*a)
    )
    return seen


def test_a_task_added_later_costs_its_own_samples_only(world, icons, computed):
    more = "- {name: more, data: more.json, images: images}"
    targets = write_targets(world, "more.yaml", more)
    out = world.select("more", *SMALL, "--targets", targets, method="icons")
    assert computed == [f"new{i}" for i in range(4)]
    # The product of a row with four directions and with five may round differently.
    np.testing.assert_allclose(influence(out)[:, :2], influence(icons), atol=1e-7)


def test_a_pool_that_has_grown_costs_its_new_samples_only(world, icons, computed):
    records = json.loads(world.pool.read_text())
    new = [{**record, "id": f"grown{i}"} for i, record in enumerate(records[:3])]
    path = world.pool.with_name("grown.json")
    path.write_text(json.dumps(new + records))
    flags = [*SMALL, "--targets", write_targets(world), "--pool", str(path)]
    out = world.select("grown", *flags, method="icons")
    assert computed == ["grown0", "grown1", "grown2"]
    np.testing.assert_allclose(influence(out)[3:], influence(icons), atol=1e-7)


def test_replays_and_is_known_again(world, icons, capsys):
    config = ["select", "--config", str(icons / "config.yaml")]
    main([*config, "--out", str(world.folder / "again")])
    assert subset(world.folder / "again") == subset(icons)
    capsys.readouterr()
    main(world.argv("icons", *SMALL, "--targets", write_targets(world), method="icons"))
    assert "already holds this run" in capsys.readouterr().out


def test_two_processes_choose_what_one_chooses(world, icons):
    flags = [*SMALL, "--targets", write_targets(world), "--block_size", "8"]
    argv = world.argv("two", *flags, method="icons", store="store-two")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "selection", *argv],
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert subset(world.folder / "two") == subset(icons)


@pytest.mark.parametrize(
    ("change", "difference"),
    [("weight: 2", "targets"), ("subtasks: id", "targets")],
)
def test_other_targets_are_another_run(world, icons, change, difference):
    path = world.folder / "wanted/other.yaml"
    kinds = f"- {{name: kinds, data: pool.json, images: images, {change}}}"
    path.write_text(f"{kinds}\n- {{name: text, data: text.json}}")
    with pytest.raises(UsageError, match=difference):
        main(world.argv("icons", *SMALL, "--targets", str(path), method="icons"))


def test_methods_with_targets_need_them(world):
    with pytest.raises(UsageError, match="--targets is missing"):
        main(world.argv("x", *SMALL, method="icons"))
    with pytest.raises(UsageError, match="--targets: no such flag"):
        main(world.argv("x", "--targets", "x.yaml", method="tive"))


def test_visual_dependency_is_what_the_image_adds(world, icons):
    flags = [*SMALL, "--targets", write_targets(world), "--visual_dependency", "true"]
    out = world.select("visual", *flags, method="icons")
    text_only = [r for r in range(48) if r % 4 >= 2]
    assert (influence(out)[text_only] == 0).all()
    assert (influence(out)[[r for r in range(48) if r % 4 < 2]] != 0).all()
    signals = manifest(out)["signals"]
    clean, noise = (
        StoreReader.open(signals[n]["folder"]) for n in ("gradients", "noise_gradients")
    )
    g, h = (r.column("gradient").astype(float) * r.column("norm")[:, None] for r in (clean, noise))
    goal = StoreReader.open(signals["gradients of text"]["folder"]).column("gradient")
    slow = ((g - h) @ goal.astype(float).T).mean(1) / clean.column("norm")
    np.testing.assert_allclose(influence(out)[:, 1], slow, atol=3e-5)


def later_checkpoint(world):
    """The model with other weights in its last layers."""
    other = shutil.copytree(world.model, world.folder / "later")
    weights = load_file(other / "model.safetensors")
    for name in weights:
        if "language_model" in name and name.endswith("down_proj.weight"):
            weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return other


def test_less_takes_the_largest_of_all_sub_tasks_over_checkpoints(world):
    other = later_checkpoint(world)
    rates = ["--checkpoints", f"[{world.model},{other}]", "--learning_rates", "[3e-5,1e-5]"]
    flags = [*SMALL, "--targets", write_targets(world), "--gradient", "sgd"]
    out = world.select("less", *flags, *rates, method="less")
    parts = [
        world.select(f"less-{i}", *flags, "--checkpoints", f"[{path}]", method="less")
        for i, path in enumerate((world.model, other))
    ]
    first, second = map(influence, parts)
    assert not np.allclose(first, second)
    np.testing.assert_allclose(influence(out), 0.75 * first + 0.25 * second, atol=1e-7)
    scores = read_run(out).scores
    np.testing.assert_array_equal(scores, influence(out).max(axis=1))
    assert set(manifest(out)["signals"]) >= {"gradients_1", "gradients_2 of text"}


def test_another_optimizer_state_is_another_run_of_less(world, tmp_path):
    parameters = list(factors(save_lora(world.model, tmp_path / "lora")).values())
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    flags = [*SMALL, "--targets", write_targets(world), "--model_base", str(world.model)]

    def select(name: str) -> None:
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "lora/optimizer.pt")
        world.select(name, *flags, "--model", str(tmp_path / "lora"), method="less")

    select("moments")
    with pytest.raises(UsageError, match="read"):
        select("moments")


def test_rds_and_tive_run(world, icons):
    rds = world.select("rds", "--targets", write_targets(world), "--budget", "0.25", method="rds")
    assert influence(rds).shape == (48, 2) and (np.abs(influence(rds)) <= 1).all()
    tive = world.select("tive", *SMALL, method="tive")
    tasks = json.loads((tive / "artefacts/tasks.json").read_text())
    assert {task["name"]: task["n_samples"] for task in tasks} == {
        "mcq": 12,
        "open": 12,
        "text": 24,
    }


def test_dry_run_tells_the_cost_of_every_task(world, icons, capsys):
    before = stores(world)
    main(world.argv("x", *SMALL, "--targets", write_targets(world), "--dry-run", method="icons"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "icons: 12 of 48 samples"
    assert [line.split(":")[0] for line in lines[1:]] == SIGNALS
    assert all("already stored" in line for line in lines[1:])
    assert stores(world) == before and not (world.folder / "x").exists()


def test_compare_writes_matrices_and_pictures(world, icons, capsys):
    chance = world.select("chance", "--budget", "0.5", method="random")
    out = world.folder / "comparison"
    main(["compare", str(icons), str(chance), "--out", str(out)])
    found = json.loads((out / "compare.json").read_text())
    mine, theirs = (
        {int(line) for line in (run / "subset_rows.txt").read_text().split()}
        for run in (icons, chance)
    )
    shared = len(mine & theirs)
    assert found["overlap"] == [[1, shared / 12], [shared / 24, 1]]
    assert found["rank_correlation"][0][1] == pytest.approx(found["rank_correlation"][1][0])
    special = found["specialists of icons"]
    assert special["tasks"] == ["kinds", "text"]
    best = [set(np.argsort(-column, kind="stable")[:12]) for column in influence(icons).T]
    assert special["overlap"][0][1] == len(best[0] & best[1]) / 12
    assert special["in_subset"] == [len(b & mine) / 12 for b in best]
    for name in ("overlap.png", "specialists-icons.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "rank correlation" in capsys.readouterr().out


def test_compare_refuses_what_cannot_be_compared(world, icons, tmp_path):
    chance = world.select("chance", "--budget", "0.5", method="random")
    first = world.select("first", "--limit", "40", "--budget", "0.5", method="random")
    with pytest.raises(UsageError, match="at least two"):
        main(["compare", str(chance), "--out", str(tmp_path)])
    with pytest.raises(UsageError, match="at least two"):
        main(["compare"])
    with pytest.raises(UsageError, match="holds no finished run"):
        main(["compare", str(icons), str(tmp_path)])
    with pytest.raises(UsageError, match="another pool"):
        main(["compare", str(icons), str(first), "--out", str(tmp_path)])


def test_overlap_is_the_share_of_the_first():
    a, b = np.array([1, 2, 3, 4]), np.array([4, 9])
    np.testing.assert_array_equal(overlaps([a, b], [a, b]), [[1, 0.25], [0.5, 1]])


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, 50).astype(float), rng.normal(size=50)
    a[3], b[7] = np.nan, np.nan
    both = [i for i in range(50) if i not in (3, 7)]

    def ranks(x):
        return [sum(y < x[i] for y in x[both]) + sum(y == x[i] for y in x[both]) / 2 for i in both]

    slow = np.corrcoef(ranks(a), ranks(b))[0, 1]
    found = rank_correlations([a, b, np.ones(50)])
    assert found[0, 1] == pytest.approx(slow) and found[0, 0] == pytest.approx(1)
    assert np.isnan(found[2]).all()
