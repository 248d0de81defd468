"""Evaluation questions as data; the benchmarks' file formats are made of them in evalformats."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question; `answer` indexes `options`. `zh` is the same in Chinese."""

    id: str
    category: str
    question: str
    options: tuple[str, ...]
    answer: int
    picture: bytes | None = None
    hint: str = ""
    zh: tuple[str, tuple[str, ...]] | None = None


@dataclass(frozen=True)
class Probe:
    """Whether an object is in the picture; `category` is random, popular or adversarial."""

    category: str
    name: str
    present: bool
    picture: bytes


@dataclass(frozen=True)
class Open:
    """A question with a short free answer."""

    id: str
    category: str
    question: str
    answer: str
    picture: bytes


@dataclass(frozen=True)
class Claim:
    """Two yes-or-no questions about a picture, the first answered yes, the second no."""

    category: str
    picture: bytes
    true: str
    false: str


@dataclass(frozen=True)
class Exam:
    """A question with several pictures, which text and options call `<image 1>`, `<image 2>`, ...

    `answer` is a letter, or a short text if there are no options.
    """

    subject: str
    question: str
    options: tuple[str, ...]
    answer: str
    pictures: tuple[bytes, ...]


@dataclass(frozen=True)
class Passage:
    """A yes-or-no question that its passage answers."""

    passage: str
    question: str
    answer: bool


@dataclass(frozen=True)
class EvalSets:
    """All evaluation sets; `mcq` has Chinese twins, `mixed` has questions without a picture."""

    mcq: list[Choice]
    mixed: list[Choice]
    yesno: list[Probe]
    open_ended: list[Open]
    unseen: list[Choice]
    printed: list[Open] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    knowledge: list[Choice] = field(default_factory=list)
    exams: list[Exam] = field(default_factory=list)
    facts: list[Choice] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)

    def pictures(self) -> set[bytes]:
        """Every picture shown (PNG bytes)."""
        items = [*self.mcq, *self.mixed, *self.yesno, *self.open_ended, *self.unseen]
        items += [*self.printed, *self.claims, *self.knowledge]
        shown = {item.picture for item in items if item.picture is not None}
        return shown.union(*(exam.pictures for exam in self.exams))
