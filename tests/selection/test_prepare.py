"""What methods want trained: which folder it goes to, that it is trained once, and what uses it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llava.errors import UsageError
from llava.recipe import Recipe
from selection.methods import find_methods
from selection.methods.base import CoTrain, Method
from selection.prepare import Asked, co_train, main, warm_up
from selection.settings import Job, PoolSettings, ProxySettings, SelectSettings
from tests.tiny_models import save_clip, save_llava, save_pool

N = 40
TRAINING = [name for name, method in find_methods().items() if method().training()]
WARM_UPS = [name for name in TRAINING if name != "coido"]
SMALL = {
    **dict(bf16="False", lora_r="4", lora_alpha="8", model_max_length="256"),
    **dict(gradient_checkpointing="False", dataloader_num_workers="0", tf32="False"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a pool and its images, a copy of the pool, models and a file of targets."""
    folder = tmp_path_factory.mktemp("prepare")
    pool, images = save_pool(folder / "pool", N)
    shutil.copy(pool, folder / "pool/copy.json")
    (folder / "targets.yaml").write_text(f"- {{name: t, data: {pool}, images: {images}}}\n")
    for name in ("model", "other"):
        save_llava(folder / name)
    config = folder / "other/llava.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 99}))
    save_clip(folder / "clip")
    shutil.copytree(folder / "clip", folder / "clip2")
    settings = folder / "clip2/preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "resample": 2}))
    for name in ("a.pt", "b.pt"):
        (folder / name).write_bytes(name.encode())
    for name in ("words", "more_words"):
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text(json.dumps({"name": name}))
    return folder


@pytest.fixture
def recipe(world) -> Recipe:
    names = {"MODEL": world / "model", "VISION_TOWER": "", "PROJECTOR": "", "ZERO": "none"}
    names |= {"GLOBAL_BATCH": "8", "OUTPUT": "o", "DATA": "d"}
    read = Recipe.read("finetune_lora", {name: str(value) for name, value in names.items()})
    return replace(read, per_device=4, flags={**read.flags, **SMALL}, scaled=True)


def flags_of(world: Path, method: str) -> list[str]:
    """What a run of `method` has to be told."""
    flags = ["--pool", world / "pool/pool.json", "--images", world / "pool/images"]
    if find_methods()[method].target_signals is not Method.target_signals:
        flags += ["--targets", world / "targets.yaml"]
    if method == "coido":
        flags += ["--clip", world / "clip", "--share", "24"]
        flags += ["--n_clusters", "4", "--n_neighbours", "4"]
    if method == "mllm_selector":
        flags += ["--n_seed", "8"]
    return [str(word) for word in flags]


def folder_of(world: Path, recipe: Recipe, method: str, *more: str) -> str:
    """The name of the folder of the one training of a run, given further flags."""
    return name_of(Asked.read(["select", method, *flags_of(world, method), *more]), recipe)


def name_of(asked: Asked, recipe: Recipe) -> str:
    """The digest in the folder's name; what the pool is called stands before it."""
    (training,) = asked.missing
    if isinstance(training, CoTrain):
        folder = co_train(training, asked, recipe, ()).folder
    else:
        folder = warm_up(training, asked, recipe).folder
    return folder.name.rpartition("-")[2]


def changed(job: Job, values: dict) -> Job:
    """The job with other values of flags, of whichever group they are."""
    groups = {name: getattr(job, name) for name in ("pool", "proxy", "select")}
    groups["settings"] = job.method.settings
    for name, group in groups.items():
        names = {field.name for field in dataclasses.fields(group)} & values.keys()
        groups[name] = replace(group, **{name: values[name] for name in names})
    return replace(job, method=type(job.method)(groups.pop("settings")), **groups)


def changes(world: Path) -> dict:
    """Another value of every flag there is, by the flag's name."""
    return {
        **dict(pool=f"{world}/pool/copy.json", images=f"{world}/pool", image_roots=(f"{world}",)),
        **dict(limit=N - 1, model_base="b", dtype="bfloat16", device="cpu", store="elsewhere"),
        **dict(batch_size=3, max_tokens=99, block_size=7, num_workers=1, max_bad=0.5),
        **dict(budget="9", rounding="floor", seed=1, out="elsewhere", force_new=True),
        # of the methods that train something
        **dict(aggregation="merge", subtasks="max", visual_dependency=True, dim=64),
        **dict(projection="rademacher", gradient="sgd", checkpoints=("c",), learning_rates=(0.1,)),
        **dict(necessity="nll_mean", strategy="top", group_size=5, temperature=2.0, n_seed="9"),
        **dict(seed_draw=3, holdout_model="m", holdout_base="b", q=5.0),
        **dict(scorer=f"{world}/a.pt", trajectory=f"{world}/a.pt", clip=f"{world}/clip2"),
        **dict(image_reward=f"{world}/b.pt", image_reward_tokenizer=f"{world}/more_words"),
        **dict(features="clip", prepare=True, share="25", draw=1, n_clusters=5, n_neighbours=5),
        **dict(architecture="attention", objective="sum", balance=0.25, learning_rate=1e-3),
        **dict(scorer_batch=8, epochs=3, judge_url="http://localhost:9/v1", judge_model="x"),
        **dict(judge_temperature=0.5, judge_max_tokens=11, judge_seed=7, judge_cache="c.sqlite"),
        **dict(judge_key_variable="K", judge_concurrency=2, judge_timeout=5.0, judge_attempts=2),
        **dict(judge_prices=(1.0, 1.0), judge_max_requests=5, judge_max_cost=5.0),
        **dict(judge_again="failed"),
    }


# Flags that shape the model which a method wants trained: every other one leaves its folder.
OF_THE_POOL = {"images", "limit"}
SHAPING = {
    **{name: OF_THE_POOL for name in WARM_UPS},
    "mllm_selector": OF_THE_POOL | {"n_seed", "seed_draw"},
    "coido": OF_THE_POOL
    | set("seed dtype clip image_reward image_reward_tokenizer features share".split())
    | {"draw"}
    | set("n_clusters n_neighbours architecture objective balance learning_rate epochs".split())
    | set("judge_url judge_model judge_temperature judge_max_tokens judge_seed".split())
    | {"judge_cache"},
}
# Flags after which nothing is trained, because they name what would be, or its place.
ANSWERED = {
    "less": {"checkpoints"},
    "rho_loss": {"holdout_model"},
    "coido": {"scorer", "trajectory", "prepare"},
}


def beside(world: Path, flag: str) -> dict:
    """What has to be given beside `flag` for it to count."""
    given = {}
    if flag.startswith("image_reward"):
        given |= dict(image_reward=f"{world}/a.pt", image_reward_tokenizer=f"{world}/words")
    if flag.startswith("judge_") and flag != "judge_url":
        given |= dict(judge_url="http://localhost:8/v1", judge_prices=(2.0, 2.0))
    return given


@pytest.mark.parametrize("method", TRAINING)
def test_every_flag_leaves_the_folder_or_makes_another_one(world, recipe, method):
    """N6: a flag that shapes the trained model changes its folder, no other does; one that names
    what would be trained stops the training."""
    job = Asked.read(["select", method, *flags_of(world, method)]).job
    groups = (PoolSettings, ProxySettings, SelectSettings, type(job.method.settings))
    flags = {field.name for group in groups for field in dataclasses.fields(group)} - {"model"}
    other_values, shaping = changes(world), set()
    assert flags <= other_values.keys()
    for flag in flags:
        start = changed(job, beside(world, flag))
        after = Asked.of(changed(start, {flag: other_values[flag]}))
        if flag in ANSWERED.get(method, ()):
            assert after.missing == [], flag
        elif name_of(Asked.of(start), recipe) != name_of(after, recipe):
            shaping.add(flag)
    assert shaping == SHAPING[method]


def test_flags_with_hyphens_and_their_files_are_the_same_flags(world, recipe, tmp_path):
    """N8."""
    one = folder_of(world, recipe, "mllm_selector", "--n_seed=9", "--seed_draw", "4")
    assert one == folder_of(world, recipe, "mllm_selector", "--n-seed", "9", "--seed-draw=4")
    (tmp_path / "c.yaml").write_text("n_seed: '9'\nseed_draw: 4\n")
    argv = ["select", "mllm_selector", "--config", str(tmp_path / "c.yaml")]
    argv += flags_of(world, "mllm_selector")[:4]
    assert name_of(Asked.read(argv), recipe) == one


def test_another_pool_content_base_recipe_or_program_is_another_folder(world, recipe, tmp_path):
    folders = {folder_of(world, recipe, "icons")}
    for changed in (
        replace(recipe, model=str(world / "other")),
        replace(recipe, global_batch=16),
        replace(recipe, flags={**recipe.flags, "learning_rate": "1e-3"}),
        replace(recipe, module="another.program"),
    ):
        folders.add(folder_of(world, changed, "icons"))
    pool = json.loads((world / "pool/pool.json").read_text())
    other = tmp_path / "pool/other.json"
    other.parent.mkdir()
    other.write_text(json.dumps(pool[::-1]))
    folders.add(folder_of(world, recipe, "icons", "--pool", str(other)))
    folders.add(folder_of(world, recipe, "less"))  # keeps Adam's moments
    folders.add(folder_of(world, recipe, "rho_loss"))  # other samples
    assert len(folders) == 8
    for same in (
        replace(recipe, output="elsewhere", data="elsewhere", per_device=2, report_to="wandb"),
        replace(recipe, flags={**recipe.flags, "logging_steps": "7"}),
    ):
        assert folder_of(world, same, "icons") == folder_of(world, recipe, "icons")
    assert folder_of(world, recipe, "tive") == folder_of(world, recipe, "icons")


def test_a_base_that_changes_in_place_is_another_folder(world, recipe, tmp_path):
    base = shutil.copytree(world / "model", tmp_path / "base")
    moved = replace(recipe, model=str(base))
    before = folder_of(world, moved, "icons")
    settings = base / "llava.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 98}))
    assert folder_of(world, moved, "icons") != before


@pytest.mark.parametrize("method", TRAINING)
def test_what_is_named_is_not_trained(world, method):
    argv = ["select", method, *flags_of(world, method)]
    needs_model = method != "rho_loss"  # its proxy is named anyway
    assert len(Asked.read(argv).missing) == 1
    assert len(Asked.read([*argv, "--model", "m"]).missing) == (0 if needs_model else 1)
    assert len(Asked.read([*argv, "--model=m"]).missing) == (0 if needs_model else 1)


def test_all_wants_one_proxy_and_the_holdout_model(world):
    argv = ["all", *flags_of(world, "icons")]
    proxy, holdout = Asked.read(argv).missing
    assert (proxy.moments, proxy.seed, holdout.seed, holdout.fills) == (
        *(True, 0),
        *(1, "holdout_model"),
    )
    assert Asked.read([*argv, "--holdout-model", "h"]).missing == [proxy]
    assert Asked.read([*argv, "--model", "m"]).missing == []


def test_mistakes_are_told_and_a_dry_run_stops_before_anything_is_trained(
    world, recipe, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    argv = ["select", "icons", *flags_of(world, "icons")]
    with pytest.raises(UsageError, match="--budgt: no such flag"):
        main([*argv, "--budgt", "1"], recipe)
    with pytest.raises(UsageError, match="icons would first train a model; name one with --model"):
        main([*argv, "--dry-run"], recipe)
    with pytest.raises(UsageError, match="name one with --holdout_model"):
        main(["select", "rho_loss", *flags_of(world, "rho_loss"), "--dry_run"], recipe)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A working directory from which real trainings and selections start, one process each."""
    monkeypatch.chdir(tmp_path)
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", root)
    for name, value in {"NPROC": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOBAL_BATCH", raising=False)
    return tmp_path


def trained(folder: Path) -> dict[str, int]:
    """When each finished model below `folder` was written."""
    return {
        str(p.parent.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("COMPLETE")
    }


@pytest.mark.slow
def test_a_warm_up_is_trained_once_and_its_newest_checkpoint_taken(world, recipe, clone):
    """N7: of checkpoint-9 and checkpoint-18 the newest whole one, never an incomplete one."""
    argv = ["select", "less", *flags_of(world, "less"), "--dim", "64", "--store", "store"]
    recipe = replace(recipe, global_batch=1, per_device=1)
    deciding = [*argv, "--budget", "5", "--out"]
    assert main([*deciding, "one"], recipe) == 0
    (folder,) = (clone / "outputs").iterdir()
    (checkpoint,) = (folder / "model").glob("checkpoint-*")
    manifest = json.loads(Path("one/manifest.json").read_text())
    before = trained(folder)

    # A later checkpoint that was cut short, and one whose number is smaller but sorts behind.
    step = int(checkpoint.name.rpartition("-")[2])
    (folder / f"model/checkpoint-{step + 7}").mkdir()
    shutil.copytree(checkpoint, folder / "model/checkpoint-1")
    assert main([*deciding, "two"], recipe) == 0
    assert trained(folder) == {**before, "model/checkpoint-1": before[f"model/{checkpoint.name}"]}
    again = json.loads(Path("two/manifest.json").read_text())
    assert again["proxy"] == manifest["proxy"]
    assert again["subset"]["sha256"] == manifest["subset"]["sha256"]


@pytest.mark.slow
def test_a_scorer_is_trained_beside_a_lora_and_another_one_for_another_seed(world, recipe, clone):
    argv = ["select", "coido", *flags_of(world, "coido"), "--store", "store", "--budget", "6"]
    assert main([*argv, "--out", "one"], recipe) == 0
    first = trained(clone / "outputs")
    assert main([*argv, "--out", "two", "--judge_concurrency", "3"], recipe) == 0
    assert trained(clone / "outputs") == first
    assert main([*argv, "--out", "three", "--seed", "1"], recipe) == 0
    assert len(trained(clone / "outputs")) == 2 * len(first)
    digests = [
        json.loads(Path(f"{name}/run.json").read_text())["files"]["scorer"]["sha256"]
        for name in ("one", "two", "three")
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.slow
def test_a_training_that_fails_ends_with_its_code(world, recipe, clone):
    argv = ["select", "icons", *flags_of(world, "icons"), "--store", "store"]
    broken = replace(recipe, flags={**recipe.flags, "lora_r": "none"})
    assert main(argv, broken) == 2
    assert not list(Path(".").rglob("COMPLETE")) and not Path("store").exists()
    assert os.environ["NPROC"] == "1"
