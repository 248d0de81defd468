"""Signals (P16): a checkpoint after the step, exit code 75, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from llava.train.checkpoints import MARKER, is_complete
from tests.llava.train.processes import ALONE, TORCHRUN, started, wait_until

LONG = {"max_steps": 400, "logging_steps": 1, "group_by_modality_length": True}


def history(folder: Path, key: str = "loss") -> list[float]:
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line[key] for line in lines if key in line]


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))


def test_signal_then_the_same_command_equals_a_run_without(run, tmp_path):
    """Dropout, a step of two batches, and the signal wherever it falls."""
    common = {**LONG, "max_steps": 30, "lora_enable": True, "lora_dropout": 0.3}
    common |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    whole = run("whole", **common)
    flags = run.flags("parted", **common)
    with started([*ALONE, *flags]) as program:
        program.wait_for("step 5/")
        program.process.send_signal(signal.SIGUSR1)
        assert program.end() == 75, program.text
    (last,) = [line for line in program.lines if "SIGUSR1" in line]
    assert "the same command goes on" in last and "Traceback" not in program.text
    (found,) = checkpoints(tmp_path / "parted")
    assert is_complete(found) and 5 <= int(found.name[11:]) < 30
    parted = run("parted", **common)
    for file in [*whole.glob("*.safetensors"), *whole.glob("*.bin")]:
        assert (parted / file.name).read_bytes() == file.read_bytes(), file.name
    assert history(parted) == history(whole)


def test_signal_during_a_checkpoint_and_the_second_signal(run, tmp_path):
    out = tmp_path / "out"
    flags = run.flags("out", **LONG, save_strategy="steps", save_steps=1, dataloader_num_workers=1)

    def is_writing() -> bool:
        return any(not (folder / MARKER).exists() for folder in out.glob("checkpoint-*"))

    with started([*ALONE, *flags]) as program:
        program.wait_for("step 2/")
        wait_until(is_writing, program.process, program)
        program.process.send_signal(signal.SIGTERM)
        assert program.end() == 75, program.text
    assert all(is_complete(folder) for folder in checkpoints(out))
    # Now stuck: its loader process hangs, so the step that a signal waits for never ends.
    with started([*ALONE, *flags]) as program:
        program.wait_for("goes on after step")
        program.wait_for("step ")
        loader = loader_of(program.process.pid)
        loader.send_signal(signal.SIGSTOP)
        program.process.send_signal(signal.SIGTERM)
        time.sleep(3.5)
        assert program.process.poll() is None
        sent = time.monotonic()
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(10) == 128 + signal.SIGTERM
        assert time.monotonic() - sent < 2
        loader.kill()


def loader_of(pid: int) -> psutil.Process:
    children = psutil.Process(pid).children()
    (loader,) = [child for child in children if "resource_tracker" not in str(child.cmdline())]
    return loader


def test_signal_while_waiting_for_data(run, tmp_path):
    flags = run.flags("out", **LONG, dataloader_num_workers=1)
    with started([*ALONE, *flags]) as program:
        program.wait_for("step 2/")
        loader = loader_of(program.process.pid)
        loader.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        os.killpg(program.process.pid, signal.SIGTERM)  # as a scheduler does: loaders, too
        time.sleep(0.5)
        loader.send_signal(signal.SIGCONT)
        assert program.end() == 75, program.text
    assert is_complete(checkpoints(tmp_path / "out")[-1])


@pytest.mark.slow
def test_signal_to_one_of_two_processes(run, tmp_path):
    """It is the signal of both: a checkpoint with the part of each, and 75 through the launcher."""
    words = ["-m", "llava.launch", *TORCHRUN[2:], *run.flags("out", **LONG)]
    with started(words) as program:
        program.wait_for("step 2/")
        program.ranks()[1].send_signal(signal.SIGUSR1)
        assert program.end() == 75, program.text
    (found,) = checkpoints(tmp_path / "out")
    assert is_complete(found)
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= {path.name for path in found.iterdir()}
    assert len([line for line in program.lines if "the same command goes on" in line]) == 1
    assert "Traceback" not in program.text
