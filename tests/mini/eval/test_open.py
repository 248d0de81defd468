"""GQA, GQA-OOD, TextVQA and MME: the files, and that the readers read what was meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from llava.eval.tasks import find_task
from mini.eval.items import Claim, Open
from mini.eval.open import GQA_EVERY, gqa, mme, textvqa
from mini.render import SIZE, open_png, png

ANSWERS = ("red", "red", "red", "blue", "yes", "no", "fox", "ox")


def picture(n):
    return png(Image.new("RGB", (SIZE, SIZE), (n, 50, 90)))


@pytest.fixture
def lay(tmp_path):
    """Write files; the folder of `name`."""

    def run(files, name) -> Path:
        for path, content in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(content)
        return tmp_path / name

    return run


def test_gqa_and_its_splits(lay):
    items = [Open(f"open_{i}", "object", f"Q{i}?", a, picture(i)) for i, a in enumerate(ANSWERS)]
    filler = Open("x", "object", "?", "x", picture(99))
    asked = [item for pair in zip(items, [filler] * len(items), strict=True) for item in pair]
    assert GQA_EVERY == 2
    folder = lay(gqa(asked), "gqa")
    read = find_task("gqa").read(folder)
    assert [item.answers[0] for item in read] == list(ANSWERS)
    assert all((folder / "data/images" / item.images[0]).is_file() for item in read)
    splits = [item.extra["splits"][1:] for item in find_task("gqa_ood").read(folder)]
    # red occurs 3 times of a mean of 2 among colours; the other groups have no common answer
    assert splits == [["head", "all"]] * 3 + [["tail", "all"]] + [[]] * 4
    shown = open_png((folder / "data/images" / read[3].images[0]).read_bytes())
    assert abs(shown.getpixel((40, 40))[0] - 3) <= 2


def test_textvqa(lay):
    items = [Open(f"w{i}", "word", "Read it.", f"word{i}", picture(i)) for i in range(10)]
    folder = lay(textvqa(items), "textvqa")
    task = find_task("textvqa")
    read = task.read(folder)
    assert read[0].prompt.split("\n")[:2] == ["Read it.", "Reference OCR token: word0"]
    assert read[9].prompt.split("\n")[1] == "Reference OCR token: "
    assert all(len(item.answers) == 10 for item in read)
    assert all((folder / "train_images" / item.images[0]).is_file() for item in read)
    assert task.score(read, {read[0].id: "word0"}) == {"accuracy": 10}


def test_mme(lay):
    claims = [Claim("OCR", picture(1), "Is it a?", "Is it b?")]
    claims += [Claim("count", picture(n), "One?", "Two?") for n in (2, 3)]
    folder = lay(mme(claims), "MME")
    task = find_task("mme")
    items = task.read(folder)
    assert [item.answers[0] for item in items] == ["yes", "no"] * 3
    assert [item.question_id for item in items[::2]] == [
        "OCR/000001.jpg",
        "count/000001.jpg",
        "count/000002.jpg",
    ]
    release = folder / "MME_Benchmark_release_version"
    assert all((release / item.images[0]).is_file() for item in items)
    assert (release / "OCR/000001.txt").read_text().splitlines()[1] == (
        "Is it b? Please answer yes or no.\tNo"
    )
    assert json.loads((folder / "llava_mme.jsonl").read_text().splitlines()[0])["text"] == (
        "Is it a?\nAnswer the question using a single word or phrase."
    )
