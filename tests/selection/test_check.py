"""Preflight: every seeded defect is found, and nothing else (P4)."""

from __future__ import annotations

import json
import random

import pytest
from PIL import Image

from llava.errors import UsageError
from selection.__main__ import main
from tests.tiny_models import save_llava


def record(row: int, image: str | None = None, text: str = "What is it?", answer: str = "red"):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    out = {"id": row, "conversations": turns}
    if image is not None:
        out["image"] = image
        turns[0]["value"] = "<image>\n" + text
    return out


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    picture = Image.effect_noise((40, 30), 50).convert("RGB")
    picture.save(folder / "good.png")
    picture.save(folder / "gif.jpg", format="GIF")
    Image.new("CMYK", (9, 9)).save(folder / "cmyk.jpg")
    Image.effect_noise((400, 300), 50).save(folder / "cut.jpg")  # more than one read of the header
    content = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "page.jpg").write_text("<html>not found</html>")
    (folder / "empty.png").write_bytes(b"")
    (tmp_path / "outside.png").write_bytes((folder / "good.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    return folder


GOOD = [
    record(0, "good.png"),
    record(1, "gif.jpg"),
    record(2, "cmyk.jpg"),
    record(3),
    record(3, text="the same id again"),
]
DEFECTS = {
    "no such file": record(10, "absent.png"),
    "empty": record(11, "empty.png"),
    "not an image": record(12, "page.jpg"),
    "absolute": record(13, "/etc/passwd"),
    "leaves": record(14, "../outside.png"),
    "leaves the": record(15, "link.png"),
    "URL": record(16, "http://169.254.169.254/x.png"),
    "conversations": {"id": 17, "conversations": []},
    "image": {**record(18), "image": ["good.png"]},
    "turn": {"id": 19, "conversations": [{"from": "gpt", "value": "a"}] * 2},
    "robot": {"id": 20, "conversations": [{"from": "robot", "value": "hi"}]},
}


def check(tmp_path, images, records, *flags):
    """Exit code and the report of `selection check`."""
    pool, report = tmp_path / "pool.json", tmp_path / "report.jsonl"
    pool.write_text(json.dumps(records))
    argv = ["check", "--pool", str(pool), "--images", str(images), "--report", str(report), *flags]
    try:
        main(argv)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    return code, [json.loads(line) for line in report.read_text().splitlines()]


def test_sound_pool_passes(tmp_path, images, capsys):
    code, defects = check(tmp_path, images, GOOD)
    assert (code, defects) == (0, [])
    assert "5 samples, 3 with an image, 1 repeated ids" in capsys.readouterr().out


def test_every_defect_is_found_and_no_other(tmp_path, images):
    records = GOOD + list(DEFECTS.values())
    order = list(range(len(records)))
    random.Random(0).shuffle(order)
    code, defects = check(tmp_path, images, [records[i] for i in order])
    assert code == 2
    reasons = {order[entry["row"]]: entry["reason"] for entry in defects}
    assert sorted(reasons) == list(range(len(GOOD), len(records)))
    for i, word in enumerate(DEFECTS, len(GOOD)):
        assert word in reasons[i]
        assert "\n" not in reasons[i]


def test_links_may_lead_to_named_folders(tmp_path, images):
    records = [*GOOD, record(15, "link.png")]
    assert check(tmp_path, images, records, "--image_roots", f"[{tmp_path}]") == (0, [])


def test_decode_finds_damage_behind_the_header(tmp_path, images):
    records = [*GOOD, record(5, "cut.jpg")]
    assert check(tmp_path, images, records) == (0, [])
    code, defects = check(tmp_path, images, records, "--decode")
    assert code == 2 and [entry["row"] for entry in defects] == [5]
    assert "truncated" in defects[0]["reason"]


def test_labels_are_checked_with_a_tokenizer(tmp_path, images):
    model = save_llava(tmp_path / "model")
    long = record(5, "good.png", text="word " * 400)
    flags = ["--tokenizer", str(model), "--image_tokens", "16", "--model_max_length", "256"]
    code, defects = check(tmp_path, images, [*GOOD, long], *flags)
    assert code == 2
    assert [(entry["row"], entry["kind"]) for entry in defects] == [(5, "labels")]
    assert "no supervised token within 256" in defects[0]["reason"]


def test_settings_that_cannot_be_are_refused_before_a_row_is_read(tmp_path, images):
    for flags in (["--workers", "0"], ["--model_max_length", "-1"], ["--template", "v2"]):
        with pytest.raises(UsageError, match=flags[1]):
            check(tmp_path, images, GOOD, *flags)


def test_images_without_a_folder_are_defects(tmp_path, capsys):
    pool = tmp_path / "pool.json"
    pool.write_text(json.dumps(GOOD))
    with pytest.raises(SystemExit) as stopped:
        main(["check", "--pool", str(pool)])
    assert stopped.value.code == 2
    assert "no --images folder" in capsys.readouterr().out
