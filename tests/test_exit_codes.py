"""The documented exit codes come out of a launch of two processes, with one line that says why."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.llava.eval.small import save_pope
from tests.llava.model.checks import Bomb
from tests.tiny_models import save_llava, save_pool

ROOT = Path(__file__).parents[1]
LAUNCH = """
import resource, sys
from llava.launch import launch
limit, module, *argv = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
sys.exit(launch(module, argv, processes=2))
"""
BROKEN = b"not an image"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A tiny model, one whose weights are a pickle with code, a pool, a benchmark."""
    root = tmp_path_factory.mktemp("world")
    (root / "model").mkdir()
    refused = save_llava(root / "refused")
    save_llava(root / "model")
    (refused / "model.safetensors").unlink()
    torch.save({"weight": Bomb(root / "canary")}, refused / "pytorch_model.bin")
    save_pool(root / "pool", 8)
    save_pope(root / "pope", 4)
    return root


@pytest.fixture
def flags(world, tmp_path):
    """Flags of a short run of each program with the model of that name."""
    pool, images = world / "pool" / "pool.json", world / "pool" / "images"

    def of(program: str, model: str) -> list[str]:
        name = str(world / model)
        if program == "selection":
            words = ["extract", "--pool", pool, "--images", images, "--model", name]
            words += ["--store", tmp_path / "store", "--block_size", "4", "--max_bad", "0"]
        elif program == "llava.eval":
            words = ["run", "--benchmark", "pope", "--data", world / "pope", "--model", name]
            words += ["--out", tmp_path / "out", "--max_new_tokens", "2", "--batch_size", "1"]
        else:
            words = ["--model_name_or_path", name, "--data_path", pool, "--image_folder", images]
            words += ["--output_dir", tmp_path / "out", "--max_steps", "2"]
        return list(map(str, words))

    return of


def ending(program: str, flags: list[str], limit: int = 0) -> tuple[int, str]:
    """Exit code of a launch, and what it wrote to stderr."""
    words = [sys.executable, "-c", LAUNCH, str(limit), program, *flags]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stderr


def check(result: tuple[int, str], code: int, reason: str) -> None:
    assert result[0] == code, result[1]
    (line,) = re.findall("^error: .*", result[1], re.MULTILINE)
    assert re.search(reason, line) and "Traceback" not in result[1]


PROGRAMS = pytest.mark.parametrize("program", ["selection", "llava.train", "llava.eval"])


@pytest.mark.slow
@PROGRAMS
def test_a_sample_that_cannot_be_used_is_65(program, flags, world):
    """Only some process meets it, in a loader of its own where it trains; the other waits."""
    broken = [world / "pool" / "images" / f"{row}.png" for row in (5, 6, 7)]
    broken += [world / "pope" / "val2014" / "1.png"]
    contents = [path.read_bytes() for path in broken]
    try:
        for path in broken:
            path.write_bytes(BROKEN)
        loaders = ["--dataloader_num_workers", "1"] if program == "llava.train" else []
        check(ending(program, [*flags(program, "model"), *loaders]), 65, r"\.png")
    finally:
        for path, content in zip(broken, contents, strict=True):
            path.write_bytes(content)


@pytest.mark.slow
@PROGRAMS
def test_a_full_disk_is_74(program, flags):
    check(ending(program, flags(program, "model"), limit=600), 74, "cannot write: .*ulimit -f")


@pytest.mark.slow
@PROGRAMS
def test_a_refused_file_is_77(program, flags, world):
    check(ending(program, flags(program, "refused")), 77, "could run code; not loaded")
    assert not (world / "canary").exists()
