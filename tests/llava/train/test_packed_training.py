"""`--packing True` trains as without it: alone, and with modality grouping under ZeRO-3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.data import Collator
from llava.train import __main__ as entry
from llava.train.arguments import parse
from llava.train.stages import load_model
from tests.llava.train.processes import ROOT, TORCHRUN, started

# Adam's usual 1e-8 makes a whole step out of the rounding of a gradient near zero.
FLAGS = {"logging_steps": 1, "adam_epsilon": 1e-3, "seed": 3}


def history(folder: Path, key: str) -> list[float]:
    lines = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line[key] for line in lines if key in line]


def assert_same_course(ours: Path, theirs: Path) -> None:
    """Losses and gradients of every step, to the rounding of float32 over some steps."""
    for key in ("loss", "grad_norm"):
        assert len(history(ours, key)) > 2
        assert history(ours, key) == pytest.approx(history(theirs, key), rel=1e-4), key


@pytest.mark.parametrize("data", ["mixed", "text"])
def test_packed_training_is_the_same_training(run, squares, data):
    common = {
        **FLAGS,
        "data_path": squares / f"{data}.json",
        "eval_data_path": squares / "mixed.json",
    }
    plain, packed = run("plain", **common), run("packed", packing=True, **common)
    assert_same_course(packed, plain)
    assert history(packed, "eval_loss") == pytest.approx(history(plain, "eval_loss"), rel=1e-4)


def test_rows_are_what_the_attention_takes(run):
    """Not installed here, flash attention is known by its name alone."""
    arguments = parse(run.flags("out", packing=True))
    trainer, _ = entry.make_trainer(arguments, {})
    loaded = load_model(arguments)
    assert trainer.data_collator.collator.row_length == loaded.model_max_length
    assert isinstance(entry.make_collator(loaded), Collator)
    loaded.model.get_decoder().config._attn_implementation = "flash_attention_2"
    assert entry.make_collator(loaded, packing=True).row_length is None


@pytest.mark.slow
def test_packed_and_grouped_on_two_processes_with_zero_3(run, tmp_path):
    """The same steps as one process that takes each of them as a single batch of all its rows."""
    common = {**FLAGS, "group_by_modality_length": True, "num_train_epochs": 2, "max_steps": None}
    one = run("one", per_device_train_batch_size=8, **common)
    flags = run.flags(
        "two",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        packing=True,
        deepspeed=ROOT / "scripts" / "zero3.json",
        **common,
    )
    with started([*TORCHRUN, *flags]) as program:
        assert program.end() == 0, program.text
    assert_same_course(tmp_path / "two", one)
