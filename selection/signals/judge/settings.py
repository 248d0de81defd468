"""Flags of the language model that marks answers; importing them needs none of its packages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llava.errors import UsageError

NOT_DECIDING = frozenset(
    "judge_key_variable judge_concurrency judge_timeout judge_attempts judge_prices "
    "judge_max_requests judge_max_cost judge_again".split()
)
"""Fields that leave the marks as they are."""
Again = Literal["nothing", "doubtful", "failed"]


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
