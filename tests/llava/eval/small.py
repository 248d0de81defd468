"""Benchmarks of a few questions in their owners' formats, with real pictures."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ("red", "green", "blue", "yellow")
WORD = "Answer the question using a single word or phrase."


def picture(seed: int) -> bytes:
    """A PNG of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "PNG")
    return content.getvalue()


def save_mmbench(folder: Path, n: int, rotations: int = 2, n_options: int = 3) -> Path:
    """`n` questions, each with `rotations` rows; pictures are in the table."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = "index question hint A B C D answer category image".split()
    with (folder / "mmbench_dev_20230712.tsv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", restval="")
        writer.writeheader()
        for copy in range(rotations):
            for i in range(n):
                options = [f"{COLOURS[k]} {i}" for k in range(n_options)]
                options = options[copy:] + options[:copy]
                right = options.index(f"{COLOURS[i % n_options]} {i}")
                row = {
                    "index": i + 1_000_000 * copy,
                    "question": "What colour is the square?",
                    "answer": "ABCD"[right],
                    "category": ("shape", "colour")[i % 2],
                    "image": base64.b64encode(picture(i)).decode(),
                }
                writer.writerow(row | dict(zip("ABCD", options, strict=False)))
    return folder


def save_pope(folder: Path, n: int) -> Path:
    """`n` questions a category over two pictures in val2014/."""
    (folder / "val2014").mkdir(parents=True)
    (folder / "coco").mkdir()
    for i in range(2):
        (folder / "val2014" / f"{i}.png").write_bytes(picture(i))
    questions = []
    for c, category in enumerate(("adversarial", "popular", "random")):
        asked = [(f"{i % 2}.png", f"Is there a {COLOURS[i % 4]} circle?") for i in range(n)]
        questions += [
            {
                "question_id": 1000 * c + i,
                "image": image,
                "text": f"{text}\n{WORD}",
                "category": category,
            }
            for i, (image, text) in enumerate(asked)
        ]
        labels = [
            {"image": image, "text": f"{text}\n{WORD}", "label": ("yes", "no")[i % 2]}
            for i, (image, text) in enumerate(asked)
        ]
        (folder / "coco" / f"coco_pope_{category}.json").write_text(_lines(labels))
    (folder / "llava_pope_test.jsonl").write_text(_lines(questions))
    return folder


def _lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
