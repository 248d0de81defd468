"""What is asked, as data, and the two attacks on it: other option symbols, other option orders.

A question is parsed into its options once and rendered from them; option texts are data and are
never found again by searching the text. (The authors' code permutes by regular expressions; an
option whose text is a bare letter then damages the prompt.)

    symbol attack       A, B, C, ... become Q, W, E, ... ; symbols stay in position order
    permutation attack  every order of the option texts; wrong once is wrong (worst case)

Sources: Zong et al., "Fool Your (Vision and) Language Model With Embarrassingly Simple
Permutations"; ARDS, evaluation under PA, SA and SA+PA.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

# The first seven of qwer and snvf are the authors'; the last three serve longer questions.
SYMBOLS = {"abcd": "ABCDEFGHIJ", "qwer": "QWERTYUIOP", "snvf": "SNVFIGHKLM"}
LETTERS = SYMBOLS["abcd"]
MAX_ORDERS = 120

# Lines that end the last option. Any other line after it is judged by `_suffix_start`.
INSTRUCTIONS = (
    "Answer with the option's letter from the given choices directly.",
    "Answer with the option letter from the given choices directly.",
    "Please select the correct answer from the options above.",
    "请直接回答选项字母。",
    "<image>",
)
_OPTION = re.compile(r"([A-Z])\. ")


@dataclass(frozen=True)
class Ask:
    """One prompt: a question in one wording."""

    text: str
    """as in `Item.prompt`: no template, no `<image>`"""
    symbols: str = ""
    """the offered option symbols, one character a position; empty for open questions"""


@dataclass(frozen=True)
class Reply:
    """What a model answers."""

    text: str
    """decoded without special tokens, stripped"""
    logits: tuple[float, ...] = ()
    """of the offered symbols' first tokens where the answer begins, float32, in the asked order"""


@dataclass(frozen=True)
class Question:
    """A multiple-choice question as data.

    An *order* is a permutation of option numbers: position `i` shows option `order[i]`.
    """

    stem: str
    """everything before the first option"""
    options: tuple[str, ...]
    """option texts without their symbols"""
    suffix: str | None = None
    """everything after the last option, often an instruction; None if the text ends there"""
    symbols: str = LETTERS
    """the symbols the text was written with, one character a position"""

    def render(self, order: Sequence[int] | None = None, symbols: str | None = None) -> str:
        """The question with its options in `order` (default: as given) under `symbols`.

        Raises ValueError if `order` is no permutation or there are fewer symbols than options.
        """
        order = range(len(self.options)) if order is None else order
        symbols = self.symbols if symbols is None else symbols
        if sorted(order) != list(range(len(self.options))) or len(symbols) < len(order):
            raise ValueError(
                f"{len(self.options)} options cannot be shown in order {tuple(order)} "
                f"under the symbols {symbols!r}"
            )
        lines = [self.stem]
        lines += [f"{symbols[i]}. {self.options[option]}" for i, option in enumerate(order)]
        return "\n".join(lines if self.suffix is None else [*lines, self.suffix])

    def option(self, answer: str) -> int | None:
        """Number of the option that `answer` names by its bare symbol, else None."""
        answer = answer.strip()
        position = self.symbols.find(answer) if len(answer) == 1 else -1
        return position if 0 <= position < len(self.options) else None

    def symbol(self, option: int, order: Sequence[int], symbols: str | None = None) -> str:
        """Symbol under which `option` is shown in `order`."""
        return (self.symbols if symbols is None else symbols)[list(order).index(option)]


def parse_question(text: str) -> Question | None:
    """The question in `text`, or None if it is not multiple choice.

    Options are lines `A. text`, `B. text`, ... in sequence, at least two and at most ten; an
    option may run over several lines. The result always renders to `text` exactly.
    """
    lines = text.split("\n")
    starts = _option_starts(lines)
    if len(starts) < 2 or starts[0] == 0:
        return None
    end = _suffix_start(lines, starts)
    bounds = list(itertools.pairwise([*starts, end]))
    # An empty line inside an option or a stray "D. ": not a layout we know, so do not touch it.
    inner = [line for begin, stop in bounds for line in lines[begin + 1 : stop]]
    stray = (line for line in [*inner, *lines[end:]] if _OPTION.match(line))
    if not all(line.strip() for line in inner) or any(stray):
        return None
    question = Question(
        stem="\n".join(lines[: starts[0]]),
        options=tuple("\n".join(lines[begin:stop])[len("A. ") :] for begin, stop in bounds),
        suffix="\n".join(lines[end:]) if end < len(lines) else None,
    )
    return question if question.render() == text else None


def orders(n: int, key: str, limit: int = MAX_ORDERS) -> list[tuple[int, ...]]:
    """Orders of `n` options under which a question is asked, the given order first.

    All n! in lexicographic order if there are at most `limit` of them (five options and fewer by
    default). Otherwise `limit` distinct ones: the given order, the n-1 cyclic shifts (each option
    visits each position), then Fisher-Yates draws from a generator seeded with sha256 of `key`,
    which names the question.
    """
    if n < 1 or limit < 1:
        raise ValueError(f"orders of {n} options, at most {limit}: both must be at least 1")
    if math.factorial(n) <= limit:
        return list(itertools.permutations(range(n)))
    shifts = [tuple((i + shift) % n for i in range(n)) for shift in range(n)]
    sample = dict.fromkeys(shifts[:limit])
    draw = random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()))
    while len(sample) < limit:
        sample[_shuffled(n, draw)] = None
    return list(sample)


def _shuffled(n: int, draw: random.Random) -> tuple[int, ...]:
    # Only `random()` is promised to stay the same in later Python versions, `shuffle` is not.
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        j = int(draw.random() * (i + 1))
        order[i], order[j] = order[j], order[i]
    return tuple(order)


def _option_starts(lines: list[str]) -> list[int]:
    """Line numbers of the options: the last `A. ` with a `B. ` after it, and its successors."""
    lettered = [(i, match[1]) for i, line in enumerate(lines) if (match := _OPTION.match(line))]
    for first in reversed([place for place, (_, letter) in enumerate(lettered) if letter == "A"]):
        starts = []
        for i, letter in lettered[first:]:
            if len(starts) < len(LETTERS) and letter == LETTERS[len(starts)]:
                starts.append(i)
        if len(starts) > 1:
            return starts
    return []


def _suffix_start(lines: list[str], starts: list[int]) -> int:
    """First line after the last option.

    A known instruction or an empty line ends it. Without one, further lines belong to the last
    option only if another option has several lines too; else they are an instruction that we do
    not know.
    """
    last = starts[-1]
    for i in range(last + 1, len(lines)):
        if lines[i].strip() in ("", *INSTRUCTIONS):
            return i
    several = any(stop - begin > 1 for begin, stop in itertools.pairwise(starts))
    return len(lines) if several else last + 1
