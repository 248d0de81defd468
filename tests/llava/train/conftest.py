"""A few coloured squares to train on, and a way to run a training from its flags."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava.train.__main__ import train
from llava.train.arguments import parse

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mixed.json` (24 records, every third text-only), `images.json`, `text.json` and `img/`."""
    root = tmp_path_factory.mktemp("squares")
    (root / "img").mkdir()
    records = []
    for row in range(24):
        name = list(COLOURS)[row % 4]
        question = "What colour is the square?" + " Answer directly." * (row % 5)
        record = {"id": row, "image": f"{row}.png", "conversations": []}
        if row % 3 == 0:
            del record["image"]
        else:
            question = f"<image>\n{question}"
            Image.new("RGB", (30 + row, 28), COLOURS[name]).save(root / "img" / f"{row}.png")
        record["conversations"] = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": name},
        ]
        records.append(record)
    for file, chosen in (
        ("mixed", records),
        ("images", [r for r in records if "image" in r]),
        ("text", [r for r in records if "image" not in r]),
    ):
        (root / f"{file}.json").write_text(json.dumps(chosen))
    return root


@pytest.fixture
def run(parts: Path, squares: Path, tmp_path: Path) -> Callable[..., Path]:
    """Train for some tiny steps and give the output directory; flags as keyword arguments."""

    def flags(output: str, **changes) -> list[str]:
        values = {
            "model_name_or_path": parts / "lm",
            "vision_tower": parts / "clip",
            "version": "v1",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "model_max_length": 2048,
            "data_path": squares / "mixed.json",
            "image_folder": squares / "img",
            "output_dir": tmp_path / output,
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "disable_tqdm": True,
            **changes,
        }
        kept = {k: v for k, v in values.items() if v is not None}
        return [str(word) for k, v in kept.items() for word in (f"--{k}", v)]

    def run(output: str, **changes) -> Path:
        train(parse(flags(output, **changes)))
        return tmp_path / output

    run.flags = flags
    return run
