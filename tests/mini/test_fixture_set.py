"""The fixture: complete without a registry, and what the command makes."""

from __future__ import annotations

import json
from collections import Counter

from mini.fixture_set import FIXTURE, make_files
from mini.render import SIZE, open_png
from tests.mini.pixels import pixel_hash


def test_it_is_a_whole_small_pool():
    records = json.loads((FIXTURE / "pool.json").read_bytes())
    assert Counter(record["meta"]["source"] for record in records) == {
        "emoji_cap": 12,
        "emoji_vqa": 10,
        "emoji_yn": 12,
        "emoji_mcq": 14,
        "element_qa": 6,
        "element_mcq": 6,
    }
    for record in records:
        if "image" in record:
            image = open_png((FIXTURE / "images" / record["image"]).read_bytes())
            assert image.size == (SIZE, SIZE)
    notices = (FIXTURE / "NOTICE.md").read_text()
    assert "Google" in notices and "Microsoft" in notices


def test_training_and_evaluation_pictures_differ():
    train = {pixel_hash(path.read_bytes()) for path in (FIXTURE / "images").rglob("*.png")}
    shown = list((FIXTURE / "eval" / "seed_bench" / "SEED-Bench-image").iterdir())
    assert len(train) > 30 and len(shown) == 8
    assert not train & {pixel_hash(path.read_bytes()) for path in shown}


def test_the_command_makes_it_again(full_world):
    for name, content in make_files(full_world).items():
        if name.endswith("json"):  # pictures depend on the rasteriser's version
            assert (FIXTURE / name).read_bytes() == content, name
