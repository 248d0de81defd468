"""A process that is killed leaves nothing behind: no rank, no loader, nothing in /dev/shm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from llava import children
from tests.llava.eval.small import save_mmbench
from tests.llava.train.processes import Program, started, wait_until
from tests.tiny_models import save_llava, save_pool

GONE_WITHIN = 5  # seconds
LOADER = "pt_data_worker"
ONE = ("-m", "llava.launch", "--standalone", "--nproc_per_node", "1")
TWO = ("-m", "llava.launch", "--standalone", "--nproc_per_node", "2")
CODE = "import sys; from llava.launch import launch; launch(sys.argv[2], sys.argv[3:])"
FROM_PYTHON = ("-c", CODE)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny model, a pool and a benchmark that take longer than a test waits."""
    root = tmp_path_factory.mktemp("world")
    save_llava(root / "model")
    path, _ = save_pool(root / "pool", 60)
    records = json.loads(path.read_text())
    path.write_text(json.dumps([{**r, "id": i} for i, r in enumerate(records * 100)]))
    save_mmbench(root / "mmbench", 400, rotations=1)
    return root


@pytest.fixture
def flags(world, tmp_path):
    """Words that start each program, and what tells that it is at work."""
    pool, images = str(world / "pool" / "pool.json"), str(world / "pool" / "images")
    model = str(world / "model")

    def selection() -> list[str]:
        words = ["extract", "--pool", pool, "--images", images, "--model", model]
        words += ["--store", str(tmp_path / "store"), "--batch_size", "1", "--block_size", "200"]
        return ["-m", "selection", *words, "--num_workers", "2"]

    def training() -> list[str]:
        words = ["--model_name_or_path", model, "--data_path", pool, "--image_folder", images]
        words += [
            "--output_dir",
            str(tmp_path / "out"),
            "--max_steps",
            "100000",
            "--logging_steps",
            "1",
        ]
        return ["-m", "llava.train", *words, "--dataloader_num_workers", "2"]

    def evaluation() -> list[str]:
        words = ["run", "--benchmark", "mmbench", "--data", str(world / "mmbench")]
        words += ["--model", model, "--out", str(tmp_path / "out")]
        return ["-m", "llava.eval", *words]

    return {"selection": selection(), "training": training(), "evaluation": evaluation()}


def family(program: Program) -> list[psutil.Process]:
    return psutil.Process(program.process.pid).children(recursive=True)


def at_work(program: Program, name: str, out: Path, n_ranks: int) -> None:
    """Wait until every rank computes, and its loaders, where it has some, are ahead of it."""
    n_loaders = 0 if name == "evaluation" else 2 * n_ranks

    def works() -> bool:
        if [process.name() for process in family(program)].count(LOADER) < n_loaders:
            return False
        folders = {"selection": "store/*/block-*", "evaluation": "out/parts/*.jsonl"}
        if name == "training":
            return any(line.startswith("step 2/") for line in program.lines)
        return len(list(out.glob(folders[name]))) >= n_ranks

    wait_until(works, program.process, program)


def shared_memory(processes: list[psutil.Process], before: set[str]) -> list[str]:
    """What these have put into /dev/shm: PyTorch names it by their numbers, which others that left
    something there `before` may have had too."""
    numbers = {str(process.pid) for process in processes}
    names = set(os.listdir("/dev/shm")) - before
    return sorted(name for name in names if numbers & set(name.split("_")))


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "launcher", "victim"),
    [
        *[(name, (), "itself") for name in ("selection", "training")],
        *[(name, ONE, "itself") for name in ("selection", "training", "evaluation")],
        *[(name, TWO, "a rank") for name in ("selection", "training", "evaluation")],
        ("training", FROM_PYTHON, "itself"),
        ("selection", (), "its group"),
    ],
)
def test_nothing_outlives_a_kill(flags, tmp_path, name, launcher, victim):
    n_ranks, before = 2 if launcher == TWO else 1, set(os.listdir("/dev/shm"))
    with started([*launcher, *flags[name]], NPROC="1") as program:
        at_work(program, name, tmp_path, n_ranks)
        processes = family(program)
        assert len(processes) >= {"evaluation": 0}.get(name, 2) + (launcher != ())
        if name == "selection":
            assert shared_memory(processes, before)  # else there is nothing to lose
        if victim == "its group":
            os.killpg(program.process.pid, 9)
        elif victim == "itself":
            program.process.kill()
        else:
            program.ranks()[1].kill()
        deadline = time.monotonic() + GONE_WITHIN
        while left := [*filter(is_alive, processes)] + shared_memory(processes, before):
            if time.monotonic() > deadline:
                for process in filter(is_alive, processes):  # or they would outlive the test, too
                    process.kill()
                raise AssertionError(left)
            time.sleep(0.05)
        program.process.wait(GONE_WITHIN)


def test_a_child_whose_parent_has_ended_before_it_could_ask():
    """It ends at once, also where another process has become its parent."""
    words = [sys.executable, children.__file__, str(os.getppid()), "echo", "ran"]
    done = subprocess.run(words, capture_output=True)
    assert done.returncode == -9 and done.stdout == b""


def test_a_bound_command_is_that_command():
    """Its words, its environment, its exit code."""
    code = "import os, sys; print(sys.argv[1:], os.environ['WORD']); sys.exit(65)"
    words = children.bound([sys.executable, "-c", code, "a b", "-c"])
    environment = {**os.environ, "WORD": "w"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (65, "['a b', '-c'] w\n")
