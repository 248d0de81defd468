"""What a benchmark is: items read from its owners' files, and a rule that turns answers to numbers.

Items keep the order of the file. Options are data: they are read from fields, or parsed once by
`question.parse_question`, and never searched for in text again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import DataError
from llava.eval.question import Question

Id = int | str
EVAL = Path("playground/data/eval")
"""where LLaVA has its benchmarks, each in a folder of its own"""


@dataclass(frozen=True)
class Item:
    """One question of a benchmark."""

    id: Id
    """unique; `question_id` in answer files, of the type that it has in the question file"""
    prompt: str
    """what is asked: the text of the question file, without `<image>` and the template"""
    question: Question | None = None
    """the same as data, for multiple choice: stem, options, suffix"""
    gold: int | None = None
    """number of the right option, for multiple choice"""
    answers: tuple[str, ...] = ()
    """accepted or annotated answers, for open questions"""
    images: tuple[str | bytes, ...] = ()
    """paths relative to the image folder, or encoded images; empty for text alone"""
    group: str = ""
    """category, type or split that the benchmark reports by"""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """what only this benchmark's scoring needs"""

    @property
    def question_id(self) -> Id:
        """What answer files call it: `id`, unless several items share it (TextVQA, MME)."""
        return self.extra.get("question_id", self.id)


class Task:
    """Base of every benchmark."""

    name: ClassVar[str]
    """as in `scripts/v1_5/eval/<name>.sh` and `--benchmark`"""
    place: ClassVar[int] = 1000
    """where its columns stand in tables, the lowest first: ARDS's benchmarks as in its tables"""
    attacked: ClassVar[bool] = False
    """whether its options and symbols are attacked: every item has a `question`"""
    image_folders: ClassVar[tuple[str, ...]] = (".",)
    """where its pictures are, relative to the benchmark's folder; the first that exists"""

    @property
    def title(self) -> str:
        """What papers call it; a benchmark says it as a class attribute, like all else here."""
        return self.name

    @property
    def folder(self) -> str:
        """Name of its folder below `EVAL` and in the small world."""
        return self.name

    def read(self, data: Path) -> list[Item]:
        """Items in the file's order. `data` is the benchmark's folder, or its question file.

        Raises UsageError for a missing or wrong file, DataError naming file and row otherwise.
        """
        raise NotImplementedError

    def item_id(self, question_id: Id, prompt: str) -> Id:
        """Id of the item that a row of an answer file answers.

        Its `question_id`, except where several questions share one and `prompt` tells them apart.
        """
        return question_id

    def score(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, float]:
        """Published metrics, in percent, of the answers `texts` by id.

        An item without an answer is wrong unless the benchmark's own script says otherwise.
        """
        raise NotImplementedError

    def headline(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """What tables print of the published `numbers`: the first."""
        return dict([next(iter(numbers.items()))])

    def recorded(self, item: Item) -> str:
        """`prompt` in answer files, where LLaVA's script for the benchmark writes another one."""
        return item.prompt

    def counted(self, item: Item) -> bool:
        """Whether an item is in the numbers under attack that papers print."""
        return True

    def submission(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, bytes]:
        """Files in the formats of the benchmark's server or scripts, by name; none if it has none.

        An item without an answer is put in with an empty one.
        """
        return {}


def check_unique(items: Sequence[Item], where: str) -> None:
    """DataError naming the first id that two items of `where` share."""
    seen: set[Id] = set()
    for row, item in enumerate(items):
        if item.id in seen:
            raise DataError(f"{where}: row {row}: id {item.id!r} is there twice; rename one")
        seen.add(item.id)


def percent(part: float, whole: float) -> float:
    """100 part / whole; 0 for a whole of 0."""
    return 100 * part / whole if whole else 0.0
