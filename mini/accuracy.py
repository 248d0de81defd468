"""Accuracy of a model on the small world's multiple choice, beside chance and without pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from PIL.Image import Image

from llava.data import InputFormat
from llava.eval.question import Question, parse_question
from llava.images import open_image
from llava.model.checkpoint import Loaded
from llava.records import Record, load_records
from mini.samples import LETTER, LETTER_ZH

_IMAGE = "<image>\n"


@dataclass
class Accuracy:
    """`n_right` of `n` answers; `chosen` counts the positions that were answered."""

    n: int = 0
    n_right: int = 0
    chance: float = 0.0
    chosen: Counter[int] = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Right answers among all, 0 to 1."""
        return self.n_right / max(self.n, 1)

    def __str__(self) -> str:
        positions = "/".join(str(self.chosen[i]) for i in range(max(self.chosen, default=-1) + 1))
        return f"{self.share:.1%} (chance {self.chance:.1%}, positions chosen {positions})"


@torch.inference_mode()
def accuracy(
    loaded: Loaded,
    records: Sequence[Record],
    image_folder: str | Path | None,
    symbols: str = "ABCDEFG",
) -> Accuracy:
    """Share of questions whose right option's symbol is the likeliest of the symbols offered.

    With `image_folder` None the pictures are left out and the questions asked as text. Records that
    are not multiple choice are passed over.
    """
    result = Accuracy()
    chances = 0.0
    for record in records:
        text, answer = record.conversations[0].value, record.conversations[1].value
        question = parse_question(text.removeprefix(_IMAGE))
        right = None if question is None else question.option(answer)
        if question is None or right is None:
            continue
        open_picture = None
        if record.image and image_folder is not None:
            open_picture = partial(open_image, image_folder, record.image)
        scores = _symbol_scores(loaded, question, symbols, open_picture)
        chosen = int(scores.argmax())
        result.n += 1
        result.n_right += chosen == right
        result.chosen[chosen] += 1
        chances += 1 / len(question.options)
    result.chance = chances / max(result.n, 1)
    return result


def _symbol_scores(
    loaded: Loaded, question: Question, symbols: str, open_picture: Callable[[], Image] | None
) -> torch.Tensor:
    """Logits of the options' symbols as the answer's first token."""
    n = len(question.options)
    text = question.render(symbols=symbols)
    if question.suffix is None:
        text = f"{text}\n{LETTER if question.stem.isascii() else LETTER_ZH}"
    if open_picture is not None:
        text = _IMAGE + text
    turns = [("human", text), ("gpt", "")]
    sample = InputFormat.of(loaded).model_input(turns, open_picture)
    pixels = sample["pixel_values"]
    out = loaded.model(
        input_ids=sample["input_ids"][None],
        pixel_values=None if pixels is None else pixels[None],
        logits_to_keep=1,
    )
    answers = [loaded.tokenizer.encode(symbol)[0][-1] for symbol in symbols[:n]]
    return out.logits[0, -1, answers]


def load_questions(path: str | Path, limit: int | None = None) -> list[Record]:
    """Records of an evaluation file, thinned evenly to at most `limit`."""
    records = load_records(path)
    step = 1 if limit is None else max(1, len(records) // limit)
    return records[::step][:limit]
