"""Accuracy of a model on the small world's multiple choice, beside chance and without pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llava.conversation import get_template
from llava.data import expand_image
from llava.eval.question import Question, parse_question
from llava.images import open_image
from llava.model.checkpoint import Loaded
from llava.records import Record, load_records
from llava.tokens import encode_conversation
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
    found = Accuracy()
    chances = 0.0
    for record in records:
        text, answer = record.conversations[0].value, record.conversations[1].value
        question = parse_question(text.removeprefix(_IMAGE))
        right = None if question is None else question.option(answer)
        if question is None or right is None:
            continue
        pictured = record.image if image_folder is not None else None
        pixels = None
        if pictured:
            picture = open_image(Path(image_folder), pictured)
            pixels = loaded.image_processor(picture)[None]
        scores = _symbol_scores(loaded, question, symbols, pixels)
        chosen = int(scores.argmax())
        found.n += 1
        found.n_right += chosen == right
        found.chosen[chosen] += 1
        chances += 1 / len(question.options)
    found.chance = chances / max(found.n, 1)
    return found


def _symbol_scores(
    loaded: Loaded, question: Question, symbols: str, pixels: torch.Tensor | None
) -> torch.Tensor:
    """Logits of the options' symbols as the answer's first token."""
    n = len(question.options)
    text = question.render(symbols=symbols)
    if question.suffix is None:
        text = f"{text}\n{LETTER if question.stem.isascii() else LETTER_ZH}"
    prompt = f"{_IMAGE}{text}" if pixels is not None else text
    encoded = encode_conversation(
        [("human", prompt), ("gpt", "")],
        pixels is not None,
        get_template(loaded.template_name),
        loaded.tokenizer,
    )
    if pixels is not None:
        encoded = expand_image(
            encoded, loaded.n_image_tokens, loaded.image_token_id, loaded.model_max_length
        )
    out = loaded.model(input_ids=encoded.input_ids[None], pixel_values=pixels, logits_to_keep=1)
    answers = [loaded.tokenizer.encode(symbol)[0][-1] for symbol in symbols[:n]]
    return out.logits[0, -1, answers]


def load_questions(path: str | Path, limit: int | None = None) -> list[Record]:
    """Records of an evaluation file, thinned evenly to at most `limit`."""
    records = load_records(path)
    step = 1 if limit is None else max(1, len(records) // limit)
    return records[::step][:limit]
