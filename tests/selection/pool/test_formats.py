"""Instruction formats: wording in any case, first match wins, the rest by having an image."""

import json

import pytest

from selection.pool.formats import FORMATS, formats_of, instruction_format
from selection.pool.pool import Pool

PHRASE = "Answer the question using a single word or phrase."
CHOICE = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("text", "has_image", "name"),
    [
        (f"<image>\nHow many?\n{PHRASE}", True, "phrase"),
        (f"How many?\n{PHRASE}".upper(), False, "phrase"),
        (f"<image>\nWhich?\nA. x\nB. y\n{CHOICE}", True, "choice"),
        (f"Which?\nA. x\nB. y\n{CHOICE}", False, "choice"),
        ("Provide a one-sentence caption for the provided image.", True, "caption"),
        ("Please provide a short description for this region: [0, 1]", True, "region_description"),
        (
            "Please provide the bounding box coordinate of the region this sentence describes: cat",
            True,
            "region_box",
        ),
        ("Describe the image.", True, "other"),
        ("Describe the sea.", False, "plain_text"),
        (f"{CHOICE} {PHRASE}", True, "phrase"),  # the order of the table decides, not of the text
        ("", False, "plain_text"),
    ],
)
def test_format(text, has_image, name):
    assert instruction_format(text, has_image) == name


def test_a_pool_is_classified_by_the_first_question(tmp_path):
    def record(*texts, **keys):
        turns = [
            {"from": "human" if i % 2 == 0 else "gpt", "value": t} for i, t in enumerate(texts)
        ]
        return {**keys, "conversations": turns}

    records = [
        record("Tell me", "x", CHOICE, "A"),
        record(CHOICE, "A", "Tell me", "x"),
        {"conversations": "not turns"},
        record("Describe", "x", image="a.png"),
    ]
    (tmp_path / "p.json").write_text(json.dumps(records))
    codes = formats_of(Pool.open(tmp_path / "p.json"))
    assert codes[2] == -1
    assert [FORMATS[code] for code in codes[[0, 1, 3]]] == ["plain_text", "choice", "other"]
