"""One sample of the pool, and the few ways in which its texts and biases are made."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

LETTERS = "ABCDEFG"
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
SHORT_ZH = "请用一个词或短语回答。"
LETTER_ZH = "请直接回答选项字母。"
FRAMES = {"A": "#d03030", "B": "#2f6fd0", "C": "#2f9e44", "D": "#e08a1e"}  # the colour shortcut


@dataclass
class Sample:
    """`turns` alternate human and gpt; `image` is a name in the gallery, None for text only.

    `noisy`, `dup` and `biased` (names of the biases it carries, joined by "+") are oracle labels
    for analysis; a selector must not see them.
    """

    source: str
    task: str
    turns: list[str]
    image: str | None = None
    noisy: int = 0
    dup: int = 0
    biased: str = ""

    def record(self, number: int) -> dict:
        """The LLaVA record; `<image>` stands first in the first turn, as in LLaVA's own mix."""
        roles = ("human", "gpt")
        turns = [{"from": roles[i % 2], "value": text} for i, text in enumerate(self.turns)]
        record: dict = {"id": f"{self.source}_{number:05d}"}
        if self.image is not None:
            record["image"] = self.image
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        labels = ("source", "task", "noisy", "dup", "biased")
        return record | {"conversations": turns, "meta": {k: getattr(self, k) for k in labels}}


class Gallery(dict[str, bytes]):
    """Pictures the pool refers to: name under `images/` -> PNG bytes."""

    def put(self, name: str, picture: bytes) -> str:
        """Add a picture and return its name."""
        if self.setdefault(name, picture) != picture:
            raise ValueError(f"two different pictures are called {name}")
        return name


def multiple_choice(question: str, options: Sequence[str], suffix: str = LETTER) -> str:
    """Question, one lettered option a line, instruction."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines, suffix])


def article(name: str) -> str:
    """The name after "a" or "an"."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def placed(gold: str, distractors: Sequence[str], position: int) -> list[str]:
    """Options with the right one at `position`."""
    options = list(distractors)
    options.insert(position, gold)
    return options


def deck(n: int, values: Sequence, rng: random.Random) -> list:
    """`n` values in random order, each as often as any other (to within one)."""
    cards = [values[i % len(values)] for i in range(n)]
    rng.shuffle(cards)
    return cards


def biased(n: int, share: float, chance: float, rng: random.Random) -> list[bool]:
    """Which of `n` samples to force to the favoured outcome, so that its share becomes `share`.

    The others keep the `chance` of a balanced deck: share = f + (1 - f) * chance. A share of 0, or
    below chance, forces none.
    """
    forced = round(n * max(0.0, (share - chance) / (1 - chance)))
    flags = [True] * forced + [False] * (n - forced)
    rng.shuffle(flags)
    return flags


def favoured(flags: list[bool], favourite: object, values: Sequence, rng: random.Random) -> list:
    """`favourite` where a flag is set, a balanced deck of `values` over the others."""
    others = iter(deck(flags.count(False), values, rng))
    return [favourite if flag else next(others) for flag in flags]


def labels(**carried: bool) -> str:
    """Names of the biases a sample carries: `labels(position=True, colour=False)` -> "position"."""
    return "+".join(name for name, carries in carried.items() if carries)
