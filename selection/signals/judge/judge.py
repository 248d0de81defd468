"""LLM score: the mark, 0 to 10, that a language model gives the answers of a conversation (CoIDO).

Column `llm_score`. The prompt is figure 6 of the CoIDO paper, after AlpaGasus (Chen et al. 2023);
the text is the conversation without its image. Any OpenAI-compatible server can be asked:
`asking.py` sends the questions and keeps the answers. A sample whose answer is no mark (a refusal,
prose, a number outside 0 to 10) or never came has no score, whatever the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from llava.errors import DataError
from selection.signals.base import OwnModelSignal, Sample
from selection.signals.clip import text_of
from selection.signals.judge.asking import ANSWERED, ASKED, Cache, Question, Server, ask_all
from selection.signals.judge.settings import JudgeSettings
from selection.store.store import Column

if TYPE_CHECKING:
    from llava.records import Record
    from selection.pool.pool import Pool
    from selection.settings import ProxySettings
    from selection.store.store import StoreReader

SYSTEM = (
    "We would like to request your feedback on the performance of AI assistant in response to the "
    "user's questions in the conversation displayed following.\nConversation: {}"
)
USER = (
    "Please rate according to the content of the responses to the questions. The assistant should "
    "receive a score on a scale of 0 to 10, where a higher score indicates higher level of the "
    "content. Please first output a single line containing the value indicating the scores. In the "
    "subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any "
    "potential bias."
)
_MARK = re.compile(
    r"[\s*_`\"'#]*(?:(?:score|rating)\s*[:=]\s*)?[*_`]*(\d{1,2}(?:\.\d+)?)\s*(?:/\s*10|out of 10)?"
    r"[\s.*_`\"']*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Judge(OwnModelSignal, JudgeSettings):
    """The LLM score of every sample."""

    name: ClassVar[str] = "judge"
    reads_images: ClassVar[bool] = False

    def identity(self) -> dict[str, Any]:
        prompt = {"system": SYSTEM, "user": USER}
        return {**self.server.identity(), "prompt": prompt, "schema": self.schema}

    @cached_property
    def server(self) -> Server:
        names = set(Server.__dataclass_fields__)
        return Server(**{name: getattr(self, f"judge_{name}") for name in names})

    def open_model(
        self, pool: Pool, readers: Mapping[str, StoreReader], settings: ProxySettings
    ) -> Answers:
        return Answers(Cache(self.judge_cache, self.server))

    def forecast(self, scorer: Answers, pool: Pool, rows: np.ndarray) -> str:
        """How many questions there are, and a high estimate of their price."""
        asked = (question_of(pool.record(row)) for row in rows.tolist() if row not in pool.bad)
        new = {scorer.cache.key(q): self.server.most(q) for q in asked if not scorer.find(q)}
        cost = f"at most about {sum(new.values()):.2f}" if any(self.judge_prices) else "no price"
        return f"{len(new)} questions to {self.judge_model}, {cost} (--judge_prices)"

    def begin(self, scorer: Answers, pool: Pool, rows: np.ndarray) -> None:
        questions = (question_of(pool.record(row)) for row in rows.tolist() if row not in pool.bad)
        ask_all(questions, len(rows), self.server, scorer.cache, score_in)

    def columns(self, scorer: Answers) -> list[Column]:
        return [Column("llm_score", (), "float32")]

    def prepare(self, scorer: Answers, sample: Sample) -> Mark:
        return Mark(scorer.mark(question_of(sample.record)))

    def compute(self, scorer: Answers, items: list[Mark]) -> dict[str, np.ndarray]:
        return {"llm_score": np.array([item.value for item in items], np.float32)}


@dataclass
class Mark:
    """One sample's score, as an item of a batch."""

    value: float
    n_tokens: ClassVar[int] = 1
    key: ClassVar[int] = 0


@dataclass
class Answers:
    """What stands in the place of a model: the answers on disk."""

    cache: Cache

    def identity(self) -> dict[str, Any]:
        return {"kind": "judge"}

    def find(self, question: Question):
        return self.cache.find(self.cache.key(question))

    def mark(self, question: Question) -> float:
        """The score in the answer; DataError saying why there is none."""
        reply = self.find(question)
        if reply is None or reply.status == ASKED:
            raise DataError("the judge gave no answer")
        if reply.status != ANSWERED:
            raise DataError(reply.text)
        return score_in(reply.text)


def question_of(record: Record) -> Question:
    """The paper's prompt about one conversation."""
    return Question(SYSTEM.format(text_of(record)), USER)


def score_in(answer: str) -> float:
    """The mark, 0 to 10, in the first line of an answer: `8`, `8.5`, `8/10`, `Score: 8`.

    Raises DataError with the answer when the line says anything else.
    """
    lines = answer.strip().splitlines()
    mark = _MARK.fullmatch(lines[0]) if lines else None
    if mark is None or float(mark[1]) > 10:
        raise DataError(f"the judge's answer is no mark from 0 to 10: {answer.strip()[:80]!r}")
    return float(mark[1])
