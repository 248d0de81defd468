"""`python -m mini score` on the fixture, for every kind of checkpoint that training writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llava.errors import UsageError
from llava.model.checkpoint import load
from llava.train.__main__ import train
from llava.train.arguments import parse
from mini import SHIPPED
from mini.accuracy import accuracy, load_questions
from mini.captions import write_captions
from mini.score import SETS, ScoreSettings, main, scores

FIXTURE = Path(__file__).parents[2] / "mini" / "fixture"
FLAGS = {
    "model_name_or_path": SHIPPED / "llama",
    "vision_tower": SHIPPED / "clip",
    "pretrain_mm_mlp_adapter": SHIPPED / "projector.safetensors",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "image_aspect_ratio": "pad",
    "image_folder": FIXTURE / "images",
    "max_steps": 1,
    "per_device_train_batch_size": 1,
    "learning_rate": 1e-7,  # a step that changes no answer
}
STAGES = {
    "full": {"version": "v1"},
    "lora": {"version": "v1", "lora_enable": True, "lora_r": 4},
    "projector": {"version": "plain", "tune_mm_mlp_adapter": True},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder of what one step of each stage makes of the base weights."""
    root = tmp_path_factory.mktemp("trained")
    n = write_captions(FIXTURE / "pool.json", root / "captions.json")
    assert n == 12
    for stage, changes in STAGES.items():
        places = {"data_path": root / "captions.json", "output_dir": root / stage}
        flags = {**FLAGS, **places, **changes}
        train(parse([str(word) for name, value in flags.items() for word in (f"--{name}", value)]))
    return root


def test_every_kind_of_checkpoint_is_asked_the_same(trained, capsys):
    """One model in three forms: the rows agree, name by name and answer by answer."""
    rows = {}
    for stage in STAGES:
        base = [] if stage == "full" else ["--model-base", str(SHIPPED / "llama")]
        capsys.readouterr()
        main(["--model", str(trained / stage), "--data", str(FIXTURE), *base])
        title, *rows[stage] = capsys.readouterr().out.splitlines()
        assert title.startswith(str(trained / stage))
    assert rows["full"] == rows["lora"] == rows["projector"]
    names = [row.split("  ")[0] for row in rows["full"]]
    assert names == [name for name in SETS if name != "unseen"]  # the fixture has none of it
    assert all("n    8 " in row and "chance 25.0%" in row for row in rows["full"][:4])


def test_rows_are_what_their_names_say(trained):
    """Pictures are shown where they should be, symbols are those of the row."""
    loaded = load(trained / "full", dtype=torch.float32)
    found = dict(scores(loaded, FIXTURE / "eval"))
    records = load_questions(FIXTURE / "eval" / "mcq_en.json")
    assert found["mcq_en"] == accuracy(loaded, records, FIXTURE / "eval")
    assert found["mcq_en, symbols QWER"] == accuracy(loaded, records, FIXTURE / "eval", "QWERTYU")
    assert found["mcq_en, no picture"] == accuracy(loaded, records, None)
    assert found["mcq_en"] != found["mcq_en, no picture"]
    assert dict(scores(loaded, FIXTURE / "eval", limit=2))["mcq_cn"].n == 2


def test_what_cannot_be_asked_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="python -m mini build"):
        ScoreSettings(model="x", data=str(tmp_path))
    with pytest.raises(UsageError, match="at least one"):
        ScoreSettings(model="x", data=str(FIXTURE), questions=0)
    with pytest.raises(UsageError, match="without vision"):
        main(["--model", str(SHIPPED / "llama"), "--data", str(FIXTURE)])
