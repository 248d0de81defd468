"""When one process fails the others end too, and the user learns why (P17, P18)."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llava.tokens import load_tokenizer
from tests.llava.train.processes import ALONE, ROOT, TORCHRUN, started

TEXT_ONLY = {"vision_tower": None, "image_folder": None}
LONG = {"max_steps": 4000, "logging_steps": 1, **TEXT_ONLY}
GRACE = 5  # seconds that torchrun leaves to those that do not end by themselves


@pytest.fixture
def flags(run, squares):
    def flags(**changes) -> list[str]:
        return run.flags("out", data_path=squares / "text.json", **LONG, **changes)

    return flags


def torchrun(*program: str) -> list[str]:
    return [*TORCHRUN[: -len(ALONE)], *program]


@pytest.mark.slow
def test_killed_process(flags):
    with started(torchrun(*ALONE, *flags())) as program:
        program.wait_for("step 2/")
        program.ranks()[1].send_signal(signal.SIGKILL)
        sent = time.monotonic()
        assert program.end() == 1
    assert time.monotonic() - sent < 30
    assert "Signal 9 (SIGKILL)" in program.text.partition("Root Cause")[2]


@pytest.mark.slow
def test_bug_in_one_process(flags):
    script = str(Path(__file__).with_name("late_error.py"))
    with started(torchrun(script, *flags())) as program:
        program.wait_for("step 2/")
        program.ranks()[1].send_signal(signal.SIGUSR2)
        assert program.end() == 1
    summary = program.text.partition("Root Cause")[2]
    assert "Traceback" in summary and "ValueError: a bug in the second process" in summary


@pytest.mark.slow
def test_process_that_hangs(flags):
    """It is waited for `--ddp_timeout`, on CPUs too, and then killed."""
    words = torchrun("--shutdown_timeout", str(GRACE), *ALONE, *flags(ddp_timeout=12))
    with started(words) as program:
        program.wait_for("step 2/")
        program.ranks()[1].send_signal(signal.SIGSTOP)
        sent = time.monotonic()
        assert program.end() == 1
    assert 11 < time.monotonic() - sent < 120  # 27 s on an idle machine
    assert "Timed out waiting 12000ms" in program.text


def poisoned(lm: Path, folder: Path, word: str) -> Path:
    """A language model that a single word turns to NaN."""
    shutil.copytree(lm, folder)
    state = load_file(folder / "model.safetensors")
    ids, _ = load_tokenizer(lm).encode(word)
    state["model.embed_tokens.weight"][ids[-1]] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def steep(lm: Path, folder: Path) -> Path:
    """The same function, with a gradient whose norm is beyond float32."""
    shutil.copytree(lm, folder)
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"] *= 1e30
    state["lm_head.weight"] *= 1e-30
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def losses(folder: Path) -> list[float]:
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


@pytest.mark.slow
def test_all_processes_learn_what_one_has_met(run, parts, squares, tmp_path):
    """Under DDP and under ZeRO-2: a NaN and an unusable sample of the second process, a gradient
    that is not finite, nothing to learn from. Then the same processes train well, and under ZeRO-3
    they measure the held-out loss that one process measures."""
    records = json.loads((squares / "text.json").read_text())[:4]
    for row, record in enumerate(records):
        record["conversations"][1]["value"] = "@@" if row == 3 else "red"
    (tmp_path / "one.json").write_text(json.dumps(records))
    broken = json.loads((squares / "images.json").read_text())[:4]
    broken[2]["image"] = "absent.png"
    (tmp_path / "absent.json").write_text(json.dumps(broken))
    silent = [{**r, "conversations": r["conversations"][:1]} for r in records] * 2
    (tmp_path / "silent.json").write_text(json.dumps(silent))
    nan = poisoned(parts / "lm", tmp_path / "nan", "@@")
    common = {
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "max_steps": 3,
    }
    text = {"data_path": tmp_path / "one.json", **TEXT_ONLY, **common}
    zero = {"deepspeed": ROOT / "scripts" / "zero2.json"}
    held_out = {"eval_data_path": squares / "mixed.json", "eval_on_start": True}
    cases = [
        {**text, "model_name_or_path": nan},
        {**text, "model_name_or_path": steep(parts / "lm", tmp_path / "steep")},
        {**common, "data_path": tmp_path / "absent.json"},
        {**text, "data_path": tmp_path / "silent.json", "max_steps": 12},
        {**text},
        {**text, **zero, "model_name_or_path": nan},
        {**text, **zero, "model_name_or_path": tmp_path / "steep"},
        {**common, **held_out, "deepspeed": ROOT / "scripts" / "zero3.json"},
    ]
    turns = [run.flags(f"turn-{n}", **case) for n, case in enumerate(cases)]
    (tmp_path / "turns.json").write_text(json.dumps([[str(w) for w in t] for t in turns]))
    script = str(Path(__file__).with_name("errors_in_turn.py"))
    words = [sys.executable, *torchrun(script, str(tmp_path / "turns.json"), str(tmp_path))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    endings = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert endings[0] == endings[1]
    expected = [
        (70, "loss is nan", "from 0: 2 (id 6), 3 (id 9). "),
        (70, "gradient's norm is inf", "0 (id 0), 1 (id 3), 2 (id 6), 3 (id 9). "),
        (65, "row 2 (id ", "no such file"),
        (65, "10 steps in a row without a supervised token", ""),
        (0, "", ""),
        (70, "loss is nan", "from 0: 2 (id 6), 3 (id 9). "),
        (70, "gradient's norm is inf", "0 (id 0), 1 (id 3), 2 (id 6), 3 (id 9). "),
        (0, "", ""),
    ]
    for (code, text), (expected_code, *parts_of_text) in zip(endings[0], expected, strict=True):
        assert code == expected_code, text
        assert all(part in text for part in parts_of_text), text
    assert not (tmp_path / "turn-0" / "model.safetensors").exists()
    alone = run("alone", **common, **held_out)
    ours, theirs = (losses(folder) for folder in (alone, tmp_path / "turn-7"))
    assert len(ours) == 2 and ours[0] == pytest.approx(theirs[0], rel=1e-5)


@pytest.mark.slow
def test_user_error_is_one_line_and_its_exit_code(flags):
    """Said by one of two processes; through the launcher of schedulers its code is the run's."""
    words = ["-m", "llava.launch", *torchrun()[2:], *ALONE, *flags(learning_rate="high")]
    with started(words) as program:
        assert program.end() == 2, program.text
    assert len([line for line in program.lines if line.startswith("error: ")]) == 1
    assert "Traceback" not in program.text
