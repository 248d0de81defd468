"""Which checkpoints count (P14): whole ones, of this very run; what is left of others is kept."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava.errors import RefusedError, UsageError
from llava.train import checkpoints
from llava.train.checkpoints import MARKER, flaw, is_complete, mark_complete, newest_complete
from tests.faults import flip_bit, tiny_disk

FILES = {
    "model.safetensors": b"weights" * 50,
    "rng_state_1.pth": b"random",
    "global_step3/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"a share",
    "global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt": b"another",
}


def make(folder: Path) -> Path:
    """A checkpoint as ZeRO lays it out, complete."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    mark_complete(folder)
    return folder


def damages() -> dict:
    found = {"no marker": lambda folder: (folder / MARKER).unlink()}
    found["half a marker"] = lambda folder: os.truncate(folder / MARKER, 60)
    found["a word as marker"] = lambda folder: (folder / MARKER).write_text('"COMPLETE"')
    for name in FILES:
        found[f"{name} missing"] = lambda folder, name=name: (folder / name).unlink()
        found[f"{name} cut"] = lambda folder, name=name: os.truncate(folder / name, 3)
        found[f"{name} changed"] = lambda folder, name=name: flip_bit(folder / name, 4)
    return found


@pytest.mark.parametrize("damage", damages())
def test_damaged_checkpoint_is_set_aside_and_the_one_before_taken(tmp_path, damage, capsys):
    older, newer = (make(tmp_path / f"checkpoint-{step}") for step in (9, 10))
    damages()[damage](newer)
    content = {p.name: p.read_bytes() for p in newer.rglob("*") if p.is_file()}
    assert not is_complete(newer) and newest_complete(tmp_path) == older
    assert newer.exists()  # asking moves nothing
    assert checkpoints.set_aside(tmp_path) == older
    (line,) = capsys.readouterr().err.splitlines()
    assert "checkpoint-10: not used, " in line and line.endswith("kept as checkpoint-10.incomplete")
    aside = tmp_path / "checkpoint-10.incomplete"
    assert {p.name: p.read_bytes() for p in aside.rglob("*") if p.is_file()} == content
    # The run comes to step 10 again, and is interrupted again.
    (make(newer) / MARKER).unlink()
    assert checkpoints.set_aside(tmp_path) == older
    assert (tmp_path / "checkpoint-10.incomplete-2").exists() and aside.exists()


def test_marker_lists_every_file(tmp_path):
    folder = make(tmp_path / "checkpoint-3")
    listed = json.loads((folder / MARKER).read_text())["files"]
    assert {name: entry["size"] for name, entry in listed.items()} == {
        name: len(content) for name, content in FILES.items()
    }
    assert flaw(folder) is None
    assert newest_complete(tmp_path / "absent") is None


def test_rotation_keeps_two_whole_ones_and_counts_no_other(tmp_path):
    for step in (1, 2, 3, 10):
        make(tmp_path / f"checkpoint-{step}")
    for step in (4, 11):  # as a run that was killed leaves them
        (make(tmp_path / f"checkpoint-{step}") / MARKER).unlink()
    checkpoints.rotate(tmp_path, None)
    assert len(list(tmp_path.iterdir())) == 6
    checkpoints.rotate(tmp_path, 1, best=str(tmp_path / "checkpoint-1"))
    assert {int(p.name[11:]) for p in tmp_path.iterdir()} == {1, 3, 4, 10, 11}


def test_only_one_checkpoint_is_read(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        make(tmp_path / f"checkpoint-{step}")
    read = []
    described = checkpoints._described
    monkeypatch.setattr(checkpoints, "_described", lambda p: read.append(p) or described(p))
    checkpoints.set_aside(tmp_path)
    assert len(read) == len(FILES) and all("checkpoint-3" in str(path) for path in read)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_pickles_of_another_user_are_refused(tmp_path):
    folder = make(tmp_path / "checkpoint-3")
    checkpoints.check_owner(folder)
    os.chown(folder / "rng_state_1.pth", 12345, -1)
    with pytest.raises(RefusedError, match="rng_state_1.pth: belongs to another user"):
        checkpoints.check_owner(folder)


# ---- with real training --------------------------------------------------------------------------


def test_run_goes_on_from_the_newest_whole_checkpoint(run, capsys):
    """Three are asked to be one, two are kept; the newest loses a byte; the end is the same."""
    common = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    whole = run("whole", **common)
    assert {p.name for p in whole.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    assert is_complete(whole) and is_complete(whole / "checkpoint-4")
    cut = whole.parent / "cut"
    cut.mkdir()
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.copytree(whole / name, cut / name)
    os.truncate(cut / "checkpoint-6" / "optimizer.pt", 1000)
    capsys.readouterr()
    run("cut", **common)
    text = capsys.readouterr().err
    assert "checkpoint-6: not used, optimizer.pt has 1000 bytes instead of" in text
    assert "goes on after step 4 of 6" in text
    assert (cut / "checkpoint-6.incomplete").is_dir()
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_finished_run_trains_nothing_and_another_is_refused(run, parts, squares, capsys):
    out = run("out", max_steps=2)
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    capsys.readouterr()
    # What shows only how a run is watched is no other run.
    run("out", max_steps=2, logging_steps=1, save_steps=7)
    assert "already trained with these flags; nothing to do" in capsys.readouterr().err
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    message = r"of another run \(--learning_rate 0.01, now 0.5; --seed 42, now 7\); give another"
    with pytest.raises(UsageError, match=message):
        run("out", max_steps=2, learning_rate=0.5, seed=7)
    with pytest.raises(UsageError, match="the data changed; samples a step 4, now 2"):
        run("out", max_steps=2, data_path=squares / "images.json", per_device_train_batch_size=2)
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    run("out", max_steps=2, **halves)  # the same four samples a step
    other = shutil.copytree(parts / "lm", out.parent / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.raises(UsageError, match=r"another run \(the model changed\)"):
        run("out", max_steps=2, model_name_or_path=other)
    # A final model that is not whole is made again.
    flip_bit(out / "model.safetensors", 500)
    run("out", max_steps=2)
    assert "the content of model.safetensors has changed; the model is written again" in (
        capsys.readouterr().err
    )
    assert is_complete(out)


def test_checkpoint_of_another_run_is_refused(run):
    run("out", save_strategy="steps", save_steps=2)
    out = run("out", save_strategy="steps", save_steps=2)
    (out / MARKER).unlink()
    with pytest.raises(UsageError, match=r"checkpoint-6 is of another run \(--learning_rate"):
        run("out", learning_rate=1e-5)


def test_the_model_itself_is_no_place_for_the_result(run, parts):
    with pytest.raises(UsageError, match="is the model itself"):
        run("out", output_dir=parts / "lm")


@pytest.mark.parametrize("size", [40_000, 160_000, 200_000])  # cuts the model, the optimizer, ...
def test_full_disk_is_one_line_and_what_is_left_is_no_checkpoint(run, tmp_path, size):
    """P12."""
    flags = {"save_strategy": "steps", "save_steps": 2, "lora_enable": True, "lora_r": 8}
    command = [sys.executable, "-m", "llava.train", *run.flags("disk/out", **flags)]
    with tiny_disk(tmp_path / "disk", size) as disk:
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert newest_complete(disk / "out") is None
    assert done.returncode == 74, done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
