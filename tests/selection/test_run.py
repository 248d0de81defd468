"""`select` from the command line to the run folder, with real tiny models and real processes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava.errors import UsageError, UserError
from selection.__main__ import main
from selection.methods import find_methods
from selection.store.store import StoreReader
from tests.tiny_models import BUILDERS, save_clip, save_llava

N = 48
COLOURS = {"red": (200, 0, 0), "green": (0, 160, 0), "blue": (0, 0, 220), "yellow": (220, 220, 0)}
SUFFIX = "\nAnswer with the option's letter from the given choices directly."
OF_GRADIENTS_OR_TARGETS = ("icons", "less", "rds", "tive")  # tests/selection/test_run_targets.py
FAST = ["--n_clusters", "2", "--subgroup_size", "3", "--candidates", "6", "--max_orders", "4"]


def write_pool(folder: Path, n: int = N) -> tuple[Path, Path]:
    """Multiple choice, open questions and text-only records about coloured squares."""
    rng = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir(parents=True)
    records = []
    for row in range(n):
        names = list(rng.permutation(list(COLOURS)))
        record = {"id": f"q{row}", "meta": {"source": ("mcq", "open", "text")[min(row % 4, 2)]}}
        if row % 4 == 0:
            options = "".join(f"\n{s}. {name}" for s, name in zip("ABCD", names, strict=True))
            question, answer = f"<image>\nWhat colour is it?{options}{SUFFIX}", "ABCD"[row % 3]
        elif row % 4 == 1:
            question, answer = "<image>\nDescribe it.", f"a {names[0]} square"
        else:
            question, answer = f"Is {names[0]} a colour?", "yes"
        if row % 4 < 2:
            record["image"] = f"{row}.png"
            Image.new("RGB", (20 + row, 30), COLOURS[names[0]]).save(images / record["image"])
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append(record | {"conversations": turns})
    path = folder / "pool.json"
    path.write_text(json.dumps(records))
    return path, images


class World:
    """A pool, a model, and the command line that selects from them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.pool, self.images = write_pool(folder / "pool")
        self.model = model

    def argv(self, name: str, *flags: str, method: str = "ards", store: str = "store") -> list[str]:
        where = ["--pool", self.pool, "--images", self.images, "--model", self.model]
        place = ["--store", self.folder / store, "--out", self.folder / name]
        fast = FAST if method == "ards" else []
        return ["select", method, *map(str, [*where, *place]), *fast, *flags]

    def select(self, name: str, *flags: str, **options) -> Path:
        main(self.argv(name, *flags, **options))
        return self.folder / name


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return World(folder, save_llava(folder / "model"))


@pytest.fixture(scope="module")
def reference(world):
    return world.select("reference")


def subset(out: Path) -> bytes:
    return (out / "subset.json").read_bytes() + (out / "scores.parquet").read_bytes()


def command(argv: list[str]) -> list[str]:
    return [sys.executable, "-m", "selection", *argv]


@pytest.mark.parametrize("architecture", BUILDERS)
def test_ards_runs_on_any_vision_language_model(architecture, tmp_path):
    world = World(tmp_path, BUILDERS[architecture](tmp_path / "model"))
    out = world.select("run", "--budget", "0.25")
    chosen = json.loads((out / "subset.json").read_text())
    records = json.loads(world.pool.read_text())
    rows = [int(line) for line in (out / "subset_rows.txt").read_text().split()]
    assert chosen == [records[row] for row in rows]
    assert len(chosen) == N // 4
    subgroups = json.loads((out / "artefacts/subgroups.json").read_text())
    assert {group["name"].rsplit("_", 1)[0] for group in subgroups} == {"choice", "other"}
    main(["verify", str(out)])


@pytest.mark.bits
@pytest.mark.parametrize(
    "flags",
    [
        ["--batch_size", "1"],
        ["--batch_size", "5", "--max_tokens", "300"],
        ["--block_size", "7"],
        ["--num_workers", "2", "--block_size", "11"],
    ],
)
def test_subset_does_not_depend_on_how_it_is_computed(world, reference, flags, request):
    name = request.node.callspec.id
    assert subset(world.select(name, *flags, store=f"store-{name}")) == subset(reference)


def test_two_processes_choose_what_one_chooses(world, reference):
    argv = world.argv("two", "--block_size", "8", store="store-two")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *launch, "-m", "selection", *argv],
        check=True,
        timeout=240,
        env=environment,
        capture_output=True,
    )
    assert subset(world.folder / "two") == subset(reference)


def test_killed_at_random_times_and_run_again(world, reference):
    """Forked children share the imports, so that twenty kills hit the work and not the start-up."""
    small = ["--block_size", "4", "--batch_size", "2"]
    started = time.monotonic()
    straight = world.select("straight", *small, store="store-straight")
    duration = time.monotonic() - started
    argv, rng, kills = world.argv("killed", *small, store="store-killed"), random.Random(0), 0
    for _ in range(200):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            main(argv)
            os._exit(0)
        time.sleep(rng.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            kills += 1
            if kills == 20:
                break
        else:  # it was finished: begin anew
            shutil.rmtree(world.folder / "killed")
            shutil.rmtree(world.folder / "store-killed")
    assert kills == 20
    out = world.select("killed", *small, store="store-killed")
    assert subset(out) == subset(straight) == subset(reference)
    assert not list(world.folder.rglob("*.tmp"))
    assert snapshot(world.folder / "store-killed") == snapshot(world.folder / "store-straight")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_replays_from_its_own_folder(world, reference):
    main(
        ["select", "--config", str(reference / "config.yaml"), "--out", str(world.folder / "again")]
    )
    assert subset(world.folder / "again") == subset(reference)


def test_finished_run_is_not_computed_again(world, reference, capsys):
    before = (reference / "manifest.json").stat().st_mtime_ns
    main(world.argv("reference"))
    assert "already holds this run" in capsys.readouterr().out
    assert (reference / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--budget", "0.5"], "budget"),
        (["--seed", "1"], "seed"),
        (["--vector", "last_token"], "vector"),
        (["--limit", "40"], "limit"),
    ],
)
def test_another_run_in_the_folder_is_refused(world, reference, flags, difference):
    files = snapshot(reference)
    with pytest.raises(UserError, match=difference) as raised:
        main(world.argv("reference", *flags))
    assert raised.value.exit_code == 2
    assert snapshot(reference) == files


def test_a_folder_with_other_things_is_no_run_and_stays_as_it_is(world, tmp_path):
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(UsageError, match="is not empty and holds no run: choose another --out"):
        main(world.argv("wrong", "--out", str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_model_or_pool_is_refused(world, reference, tmp_path):
    other = World(tmp_path, save_llava(tmp_path / "model"))
    weights = tmp_path / "model" / "llava.json"
    weights.write_text(weights.read_text().replace("256", "250"))
    flags = ["--out", str(reference), "--store", str(tmp_path / "store")]
    with pytest.raises(UserError, match="proxy"):
        main([*world.argv("reference"), "--model", str(other.model), *flags])
    records = json.loads(world.pool.read_text())
    other.pool.write_text(json.dumps(records[1:]))
    with pytest.raises(UserError, match="pool"):
        main([*world.argv("reference"), "--pool", str(other.pool), *flags])


def test_force_new_writes_beside(world, reference):
    files = snapshot(reference)
    main(world.argv("reference", "--budget", "7", "--force-new"))
    beside = world.folder / "reference-2"
    assert len((beside / "subset_rows.txt").read_text().split()) == 7
    assert snapshot(reference) == files


def test_dry_run_writes_nothing(world, reference, capsys):
    main(world.argv("dry", "--dry-run", store="store-dry"))
    told = capsys.readouterr().out
    assert "48 samples" in told and "MiB" in told and "batches" in told
    # The copies that the second stage perturbs: never more than are foreseen.
    most = int(re.search(r"perturbed: at most (\d+) samples", told)[1])
    drawn = json.loads((reference / "manifest.json").read_text())["signals"]["perturbed"]
    assert 0 < StoreReader.open(drawn["folder"]).rows.size <= most <= 48
    assert not (world.folder / "dry").exists() and not (world.folder / "store-dry").exists()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Flags of the methods that need another model beside the proxy."""
    folder = tmp_path_factory.mktemp("models")
    clip = ["--clip", save_clip(folder / "clip")]
    holdout = ["--holdout_model", save_llava(folder / "holdout")]
    return {"clip_score": clip, "self_filter": clip, "coido": clip, "rho_loss": holdout}


@pytest.mark.parametrize(
    "method", [name for name in find_methods() if name not in OF_GRADIENTS_OR_TARGETS]
)
def test_every_method_selects(world, models, method):
    flags = map(str, models.get(method, []))
    out = world.select(f"every-{method}", "--budget", "30%", *flags, method=method)
    assert len((out / "subset_rows.txt").read_text().split()) == round(0.3 * N)


def test_ablations_are_one_flag_each_and_change_the_scores(world, reference):
    scores = (reference / "scores.parquet").read_bytes()
    for name, flags in {
        "last": ["--vector", "last_token"],
        "max": ["--aggregate", "max"],
        "nocluster": ["--clustering", "false"],
        "noperturb": ["--perturbation", "false"],
        "released": ["--preset", "as_released"],
    }.items():
        assert (world.select(name, *flags) / "scores.parquet").read_bytes() != scores, name


def test_unusable_samples_are_listed_and_never_chosen(tmp_path):
    world = World(tmp_path, save_llava(tmp_path / "model"))
    (world.images / "4.png").write_bytes(b"<html>404</html>")
    with pytest.raises(UserError) as raised:
        (world.images / "8.png").unlink()
        world.select("strict", "--max_bad", "0.001", store="strict-store")
    assert raised.value.exit_code == 65
    out = world.select("tolerant", "--max_bad", "0.1", "--budget", str(N - 2))
    bad = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in bad] == [4, 8]
    assert "not an image" in bad[0]["reason"] and "no such file" in bad[1]["reason"]
    rows = [int(line) for line in (out / "subset_rows.txt").read_text().split()]
    assert rows == [row for row in range(N) if row not in (4, 8)]
    with pytest.raises(UserError, match="can be"):
        world.select("all", "--max_bad", "0.1", "--budget", str(N))


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--budget", "0"], 2, "budget"),
        (["--budget", "1.5"], 2, "budget"),
        (["--budget", "49"], 2, "budget"),
        (["--model", "nowhere"], 2, "nowhere"),
        (["--pool", "nowhere.json"], 2, "nowhere.json"),
        (["--images", "nowhere"], 2, "nowhere"),
        (["--preset", "as_relesed"], 2, "as_released"),
        (["--n_clutsers", "3"], 2, "n_clutsers"),
        (["--device", "cuda:9"], 2, "CUDA"),
    ],
)
def test_wrong_flags_end_with_one_line(world, flags, code, words, capsys):
    with pytest.raises(UserError) as raised:
        main([*world.argv("wrong"), *flags])
    assert raised.value.exit_code == code and words in str(raised.value)
    assert "\n" not in str(raised.value) and not capsys.readouterr().err
    assert not (world.folder / "wrong").exists()


def test_command_line_prints_one_line_and_its_code(world, tmp_path):
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    done = subprocess.run(
        command(["select", "random", "--pool", str(empty)]), capture_output=True, text=True
    )
    assert done.returncode == 65
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
