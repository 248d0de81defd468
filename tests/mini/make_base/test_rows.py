"""Rows have their slots where the image stands, and batches know which slot is whose."""

import random
from pathlib import Path

import pytest
import torch

from llava.conversation import TEMPLATES
from llava.tokens import IGNORE_INDEX, encode_conversation, load_tokenizer
from mini.make_base.lessons import Lesson, Thing
from mini.make_base.rows import RowMaker, collate, description

SHIPPED = Path(__file__).parents[3] / "mini/base/llama"
THING = Thing("tropical fish", "热带鱼", "sea", ("sea", "swim"))
TURNS = (("What is shown in this image?", "tropical fish"), ("Is it big?", "No"))


class OneLesson:
    """A teacher of a single lesson."""

    def __init__(self, thing):
        self.thing = thing

    def lesson(self):
        return Lesson(TURNS, self.thing)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED)


def rows(tokenizer, thing, drawings, n=60):
    maker = RowMaker(OneLesson(thing), tokenizer, random.Random(0), drawings, n_image_tokens=5)
    return [maker.row() for _ in range(n)]


def test_text_only_rows_are_the_conversation(tokenizer):
    pairs = [p for q, a in TURNS for p in (("human", q), ("gpt", a))]
    encoded = encode_conversation(pairs, False, TEMPLATES["v1"], tokenizer)
    (row,) = rows(tokenizer, None, None, 1)
    assert (row.ids, row.labels) == (encoded.input_ids.tolist(), encoded.labels.tolist())
    assert row.n_slots == 0


def test_slots_replace_the_image_and_are_not_supervised(tokenizer):
    pairs = [p for q, a in TURNS for p in (("human", q), ("gpt", a))]
    pairs[0] = ("human", "<image>\n" + TURNS[0][0])
    ids = encode_conversation(pairs, True, TEMPLATES["v1"], tokenizer).input_ids.tolist()
    for row in rows(tokenizer, THING, {THING: [3, 4]}):
        at, n = row.slot, row.n_slots
        assert row.ids[:at] + row.ids[at + n :] == [i for i in ids if i >= 0]
        assert set(row.labels[at : at + n]) == {IGNORE_INDEX}
        assert (row.picture in (3, 4) and n == 5) != (row.words is not None)


def test_descriptions_are_mixtures_of_the_words(tokenizer):
    words, weights = description(THING, tokenizer)
    assert (
        words[: len(tokenizer.encode("tropical fish")[0])] == tokenizer.encode("tropical fish")[0]
    )
    assert weights[0] > weights[-1]
    described = [row for row in rows(tokenizer, THING, None) if row.words is not None]
    assert described
    for row in described:
        assert row.words == words
        assert row.weights.shape == (row.n_slots, len(words))
        assert row.weights.sum(1) == pytest.approx(1)


def test_batch_positions_are_the_slots(tokenizer):
    made = rows(tokenizer, THING, {THING: [0]}, 12) + rows(tokenizer, None, None, 1)
    batch = collate(made)
    marks = torch.zeros_like(batch.input_ids)
    for pictured, mark in ((True, 1), (False, 2)):
        marks[batch.positions(pictured)] = mark
    for i, row in enumerate(made):
        mark = 0 if row.n_slots == 0 else 1 if row.picture is not None else 2
        assert (marks[i, row.slot : row.slot + row.n_slots] == mark).all()
        assert (marks[i] != 0).sum() == row.n_slots
        assert (batch.labels[i, len(row.ids) :] == IGNORE_INDEX).all()
