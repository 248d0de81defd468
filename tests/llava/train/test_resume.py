"""Stopped after step k, a run ends as one that was not (P15): every bit, and the loss curve."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.llava.train.processes import ALONE, TORCHRUN

# 24 rows make 6 steps an epoch; dropout draws random numbers; the log's lines span checkpoints.
COMMON = {
    "max_steps": -1,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "group_by_modality_length": True,
    "lora_enable": True,
    "lora_dropout": 0.3,
    "lora_r": 4,
    "logging_steps": 5,
    "save_strategy": "steps",
    "save_steps": 1,
}


def history(folder: Path) -> list[dict]:
    """The curve without what depends on the clock."""
    timed = ("runtime", "per_second", "train_")
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in lines]


def assert_same(ours: Path, theirs: Path) -> None:
    files = [*ours.glob("*.safetensors"), *ours.glob("*.bin")]
    assert files
    for file in files:
        assert (theirs / file.name).read_bytes() == file.read_bytes(), file.name
    assert history(ours) == history(theirs)


def copied(checkpoint: Path, output: Path) -> None:
    output.mkdir()
    shutil.copytree(checkpoint, output / checkpoint.name)


@pytest.mark.slow
def test_every_kind_of_step(run, squares):
    """The first, mid-epoch, an epoch's end, the next epoch, and the last, before the final model.

    A held-out loss in between changes nothing either.
    """
    whole = run("whole", **COMMON, eval_data_path=squares / "text.json", eval_strategy="epoch")
    assert [line["epoch"] for line in history(whole) if "eval_loss" in line] == [1.0, 2.0]
    for k in (1, 4, 6, 9, 12):
        out = whole.parent / f"from-{k}"
        copied(whole / f"checkpoint-{k}", out)
        run(out.name, **COMMON, eval_data_path=squares / "text.json", eval_strategy="epoch")
        assert_same(whole, out)


def test_images_of_steps_done_are_not_opened(run, parts, squares):
    """Skipping costs no decoding: the pictures of the first three steps are gone."""
    folder = shutil.copytree(squares / "img", squares / "img-shrinking")
    common = {
        "data_path": squares / "images.json",
        "image_folder": folder,
        "train_sampling_strategy": "sequential",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": None,
    }
    whole = run("whole", **common)
    records = json.loads((squares / "images.json").read_text())
    for record in records[:12]:
        (folder / record["image"]).unlink()
    out = whole.parent / "out"
    copied(whole / "checkpoint-3", out)
    run("out", **common)
    assert_same(whole, out)


@pytest.mark.slow
def test_two_processes(run, tmp_path):
    """Each with its own random numbers and losses; mid-epoch, and in the next epoch."""
    flags = run.flags("x", **{**COMMON, "output_dir": None})
    program = [str(Path(__file__).with_name("stop_and_go.py")), str(tmp_path), "2,4", *flags]
    words = [sys.executable, *TORCHRUN[: -len(ALONE)], *program]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for step in (2, 4):
        assert_same(tmp_path / "whole", tmp_path / f"from-{step}")


def test_steps_of_the_log_and_of_checkpoints_are_those_of_this_command(run):
    whole = run("whole", max_steps=4, save_strategy="steps", save_steps=2, logging_steps=4)
    out = whole.parent / "out"
    copied(whole / "checkpoint-2", out)
    run("out", max_steps=4, save_strategy="steps", save_steps=1, logging_steps=1)
    assert (out / "checkpoint-3").is_dir()
    assert [line["step"] for line in history(out) if "loss" in line] == [3, 4]
