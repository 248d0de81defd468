"""Lessons as rows of ids for the base's own training loop: real template, real tokeniser.

Where a lesson has a picture, the row has slots: filled with the projected features of a drawing,
or, before any picture is seen, with a soft description, random mixtures of the embeddings of the
words for the thing. A projector has then only to land where those words are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llava.conversation import TEMPLATES
from llava.tokens import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Tokenizer, encode_conversation
from mini.make_base.lessons import Lesson, Teacher, Thing

TAG_WEIGHT = 0.25  # of a tag's token in a description, a name's token having 1
_MAX_TAGS = 8
_SPREAD = 0.7  # of the gamma draws: the smaller, the more a slot is about one word only
_PLAIN = 0.25  # share of text-stage lessons whose description is written out
_POOL = 4  # batches drawn together and divided by length, to pad less


@dataclass
class Row:
    """One conversation; `slot` is where its `n_slots` image positions begin.

    They are filled from `words` (ids) mixed with `weights` (n_slots, n_words), or from the drawing
    `picture` of the feature bank.
    """

    ids: list[int]
    labels: list[int]
    slot: int = 0
    n_slots: int = 0
    words: list[int] | None = None
    weights: np.ndarray | None = None
    picture: int | None = None


@dataclass
class Batch:
    """Rows padded to (B, L); `rows` keep what fills their slots."""

    input_ids: Tensor
    labels: Tensor
    rows: list[Row]

    def positions(self, pictured: bool) -> tuple[Tensor, Tensor]:
        """Row and column of every slot filled from a drawing, or else from words, in order."""
        pairs = [
            (i, row.slot + j)
            for i, row in enumerate(self.rows)
            if (row.picture is not None) == pictured
            for j in range(row.n_slots)
        ]
        return tuple(torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1))


class RowMaker:
    """Endless batches of lessons.

    `drawings` maps a thing to the drawings that show it; with None every picture is a description.
    """

    def __init__(
        self,
        teacher: Teacher,
        tokenizer: Tokenizer,
        rng: random.Random,
        drawings: dict[Thing, list[int]] | None = None,
        n_image_tokens: int = 36,
    ) -> None:
        self._teacher = teacher
        self._tokenizer = tokenizer
        self._rng = rng
        self._numpy = np.random.default_rng(rng.randrange(2**32))
        self._drawings = drawings
        self._n_image_tokens = n_image_tokens

    def batches(self, size: int) -> Iterator[Batch]:
        """Batches of `size` rows of about equal length."""
        while True:
            rows = sorted((self.row() for _ in range(size * _POOL)), key=lambda r: len(r.ids))
            groups = [rows[i : i + size] for i in range(0, len(rows), size)]
            self._rng.shuffle(groups)
            yield from map(collate, groups)

    def row(self) -> Row:
        """One lesson."""
        lesson = self._teacher.lesson()
        thing = lesson.thing
        if thing is None:
            return self._encode(lesson, "", None)
        if self._drawings is not None and self._rng.random() > 0.2:
            row = self._encode(lesson, "<image>\n", self._n_image_tokens)
            row.picture = self._rng.choice(self._drawings[thing])
            return row
        if self._drawings is None and self._rng.random() < _PLAIN:
            return self._encode(lesson, self._written(thing), None)
        row = self._encode(lesson, "<image>\n", self._rng.randrange(3, 9))
        row.words, row.weights = self._described(thing, row.n_slots)
        return row

    def _encode(self, lesson: Lesson, prefix: str, n_slots: int | None) -> Row:
        turns = [(f"{prefix if i == 0 else ''}{q}", a) for i, (q, a) in enumerate(lesson.turns)]
        pairs = [pair for q, a in turns for pair in (("human", q), ("gpt", a))]
        encoded = encode_conversation(pairs, n_slots is not None, TEMPLATES["v1"], self._tokenizer)
        ids, labels = encoded.input_ids.tolist(), encoded.labels.tolist()
        if n_slots is None:
            return Row(ids, labels)
        at = ids.index(IMAGE_TOKEN_INDEX)
        ids[at : at + 1] = [0] * n_slots
        labels[at : at + 1] = [IGNORE_INDEX] * n_slots
        return Row(ids, labels, at, n_slots)

    def _written(self, thing: Thing) -> str:
        n_tags = self._rng.randrange(1 + min(2, len(thing.words)))
        words = [*thing.name.split(), *self._rng.sample(thing.words, n_tags)]
        if self._rng.random() < 0.5:
            self._rng.shuffle(words)
        return " ".join(words) + "\n"

    def _described(self, thing: Thing, n_slots: int) -> tuple[list[int], np.ndarray]:
        words, weights = description(thing, self._tokenizer)
        draws = self._numpy.gamma(_SPREAD * np.tile(weights, (n_slots, 1)) + 0.05) + 1e-4
        return words, draws / draws.sum(1, keepdims=True)


def description(thing: Thing, tokenizer: Tokenizer) -> tuple[list[int], np.ndarray]:
    """Ids of the words for a thing, and how much each counts."""
    name = tokenizer.encode(thing.name)[0]
    tags = [token for word in thing.words for token in tokenizer.encode(word)[0]][:_MAX_TAGS]
    return name + tags, np.array([1.0] * len(name) + [TAG_WEIGHT] * len(tags))


def collate(rows: list[Row]) -> Batch:
    """Pad on the right with 0; causal attention never looks there."""
    length = max(len(row.ids) for row in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, : len(row.labels)] = torch.tensor(row.labels)
    return Batch(input_ids, labels, rows)
