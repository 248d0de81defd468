"""LLM score: the mark, 0 to 10, that a language model gives the answers of a conversation (CoIDO).

Column `llm_score`. The prompt is figure 6 of the CoIDO paper, after AlpaGasus (Chen et al. 2023);
the text is the conversation without its image. Any OpenAI-compatible server can be asked:
`selection/asking.py` sends the questions and keeps the answers. A sample whose answer is no mark
(a refusal, prose, a number outside 0 to 10) or never came has no score, whatever the reason.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from llava.errors import DataError, UsageError
from selection.asking import ANSWERED, ASKED, Again, Cache, Question, Server, ask_all
from selection.signals.base import Sample, Signal
from selection.signals.clip import text_of
from selection.store import Column

if TYPE_CHECKING:
    from llava.data import Record
    from selection.pool import Pool
    from selection.store import StoreReader

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
class JudgeSettings:
    """The language model that marks the answers."""

    judge_url: str | None = None
    """address of an OpenAI-compatible server, e.g. https://api.deepseek.com/v1 or
    http://localhost:8000/v1; without it there is no LLM score"""
    judge_model: str = "deepseek-chat"
    """name under which the server knows the model"""
    judge_temperature: float = 1.3
    """sampling temperature, as in CoIDO's code"""
    judge_max_tokens: int = 10
    """longest answer; the mark comes first, as in CoIDO's code"""
    judge_seed: int = 42
    """seed that is sent along"""
    judge_key_variable: str = "OPENAI_API_KEY"
    """environment variable that holds the key; a key is never taken from a flag or a file"""
    judge_cache: str = "outputs/store/judge.sqlite"
    """file of all answers ever paid for; on a local disk"""
    judge_concurrency: int = 8
    """questions under way at a time"""
    judge_timeout: float = 60.0
    """seconds to wait for an answer"""
    judge_attempts: int = 6
    """how often a question is sent when the server is busy or broken"""
    judge_prices: tuple[float, float] = (0.0, 0.0)
    """price of a million tokens, read and written: '[0.27, 1.10]'"""
    judge_max_requests: int | None = None
    """most requests of this run, repetitions included"""
    judge_max_cost: float | None = None
    """most that all answers in the cache may cost, in the currency of --judge_prices"""
    judge_again: Again = "nothing"
    """what is asked although it may have been paid: nothing; doubtful, under way when a run was
    killed; or failed, also answers that were no mark"""

    def __post_init__(self) -> None:
        for name in ("concurrency", "attempts", "max_tokens", "timeout"):
            if getattr(self, f"judge_{name}") <= 0:
                raise UsageError(f"--judge_{name}: give a number above 0")
        if len(self.judge_prices) != 2:
            raise UsageError("--judge_prices: give two, of tokens read and written: '[0.27, 1.10]'")
        if self.judge_max_cost is not None and not any(self.judge_prices):
            raise UsageError("--judge_max_cost needs --judge_prices, else every answer is free")


@dataclass(frozen=True)
class Judge(Signal, JudgeSettings):
    """The LLM score of every sample."""

    name: ClassVar[str] = "judge"
    uses_proxy: ClassVar[bool] = False
    reads_images: ClassVar[bool] = False

    def identity(self) -> dict[str, Any]:
        prompt = {"system": SYSTEM, "user": USER}
        return {**self.server.identity(), "prompt": prompt, "schema": self.schema}

    @cached_property
    def server(self) -> Server:
        names = set(Server.__dataclass_fields__)
        return Server(**{name: getattr(self, f"judge_{name}") for name in names})

    def open_model(
        self, pool: Pool, readers: Mapping[str, StoreReader], dtype: str, device: str
    ) -> Answers:
        return Answers(Cache(self.judge_cache, self.server))

    def forecast(self, proxy: Answers, pool: Pool, rows: np.ndarray) -> str:
        """How many questions there are, and a high estimate of their price."""
        asked = (question_of(pool.record(row)) for row in rows.tolist() if row not in pool.bad)
        new = {proxy.cache.key(q): self.server.most(q) for q in asked if not proxy.find(q)}
        cost = f"at most about {sum(new.values()):.2f}" if any(self.judge_prices) else "no price"
        return f"{len(new)} questions to {self.judge_model}, {cost} (--judge_prices)"

    def begin(self, proxy: Answers, pool: Pool, rows: np.ndarray) -> None:
        questions = (question_of(pool.record(row)) for row in rows.tolist() if row not in pool.bad)
        ask_all(questions, len(rows), self.server, proxy.cache, score_in)

    def columns(self, proxy: Answers) -> list[Column]:
        return [Column("llm_score", (), "float32")]

    def prepare(self, proxy: Answers, sample: Sample) -> Mark:
        return Mark(proxy.mark(question_of(sample.record)))

    def compute(self, proxy: Answers, items: list[Mark]) -> dict[str, np.ndarray]:
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
    found = _MARK.fullmatch(lines[0]) if lines else None
    if found is None or float(found[1]) > 10:
        raise DataError(f"the judge's answer is no mark from 0 to 10: {answer.strip()[:80]!r}")
    return float(found[1])
