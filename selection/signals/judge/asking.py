"""Questions to a language model behind an OpenAI-compatible server, each paid for at most once.

A question is claimed in the cache before it is sent, and its answer is committed there before it is
used (SQLite with a write-ahead log, synced at every commit), so a kill at any moment loses no paid
answer. What was under way at a kill may have been paid: it is `doubtful`, and only asked again when
told so. Refused or broken calls (429, 5xx, timeouts, cut connections) are repeated, as long as the
server says in Retry-After or else with growing random pauses. The key comes from the environment
and is cut out of everything the server says (promises P20 and P21).
"""

from __future__ import annotations

import math
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from time import time
from typing import Any, NamedTuple

import openai
import tenacity
import xxhash

from llava.errors import DataError, StorageError, UsageError, UserError
from llava.files import make_folder, storage_errors
from llava.progress import Progress
from selection.signals.judge.settings import Again

ASKED, ANSWERED, FAILED = "asked", "answered", "failed"
CHARACTERS_PER_TOKEN = 3  # English has four; the estimate is meant to be high
LONGEST_WAIT = 60.0  # seconds between attempts, unless the server names more
DAY = 86400.0
DEAD_AFTER = 10  # questions in a row without an answer before the run stops
_TRANSIENT = (openai.RateLimitError, openai.InternalServerError, openai.APIConnectionError)
_OF_THE_QUESTION = (openai.BadRequestError, openai.UnprocessableEntityError)


class Question(NamedTuple):
    """One call: the messages of a chat, system and user."""

    system: str
    user: str


class Reply(NamedTuple):
    """What became of a question. `text` is the answer, or why there is none."""

    status: str
    text: str
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass(frozen=True)
class Server:
    """Where to ask, what decides the answer, and how much it may cost."""

    url: str
    model: str
    temperature: float
    max_tokens: int
    seed: int
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 60.0
    attempts: int = 6
    prices: tuple[float, float] = (0.0, 0.0)
    """of a million tokens, read and written"""
    max_requests: int | None = None
    max_cost: float | None = None
    again: Again = "nothing"

    def identity(self) -> dict[str, Any]:
        """What decides an answer besides the question; the address does not."""
        names = ("model", "temperature", "max_tokens", "seed")
        return {name: getattr(self, name) for name in names}

    def cost(self, tokens_in: float, tokens_out: float) -> float:
        """Price of so many tokens."""
        return (tokens_in * self.prices[0] + tokens_out * self.prices[1]) / 1e6

    def most(self, question: Question) -> float:
        """A high estimate of the price of one question."""
        return self.cost(sum(map(len, question)) / CHARACTERS_PER_TOKEN + 20, self.max_tokens)


class Unanswered(Exception):
    """No attempt brought an answer."""


class Cache:
    """Answers on disk, by what was asked of whom. One connection per process and thread."""

    def __init__(self, path: str | Path, server: Server) -> None:
        self.path, self._salt = Path(path), repr(sorted(server.identity().items()))
        self._local = threading.local()

    def key(self, question: Question) -> str:
        """Equal for equal questions to equal models."""
        return xxhash.xxh3_128_hexdigest("\0".join((self._salt, *question)).encode())

    def find(self, key: str) -> Reply | None:
        """What is known of a question; None when it was never sent."""
        with self._transaction() as connection:
            select = "SELECT * FROM answers WHERE key = ?"
            row = connection.execute(select, (key,)).fetchone()
        if row is None:
            return None
        if row[-1] != _seal(row[:-1]):
            raise self._damaged("an answer in it was changed")
        return Reply(*row[2:-1])

    def put(self, key: str, reply: Reply) -> None:
        """Commit; synced to disk when this returns. Raises StorageError when the disk refuses."""
        values = (key, self._salt, *reply)
        with self._transaction() as connection:
            statement = "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)"
            connection.execute(statement, (*values, _seal(values)))

    def drop(self, key: str) -> None:
        """Take a claim back."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM answers WHERE key = ?", (key,))

    def tokens(self) -> tuple[int, int]:
        """Tokens read and written by this model so far, in all runs with this cache."""
        total = "SELECT COALESCE(SUM(tokens_in), 0), COALESCE(SUM(tokens_out), 0) FROM answers"
        with self._transaction() as connection:
            return connection.execute(f"{total} WHERE asked_of = ?", (self._salt,)).fetchone()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with storage_errors(self.path):
            try:
                with self._connection() as connection:
                    yield connection
            except sqlite3.OperationalError as error:
                raise OSError(None, str(error)) from error
            except sqlite3.DatabaseError as error:
                raise self._damaged(str(error)) from error

    def _damaged(self, reason: str) -> StorageError:
        return StorageError(
            f"{self.path}: damaged ({reason}); put a copy in its place, or delete it and pay again"
        )

    def _connection(self) -> sqlite3.Connection:
        if getattr(self._local, "pid", None) != os.getpid():  # a fork must not share one
            make_folder(self.path.parent)
            connection = sqlite3.connect(self.path, timeout=60)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, asked_of TEXT, "
                "status TEXT, text TEXT, tokens_in INTEGER, tokens_out INTEGER, seal TEXT)"
            )
            self._local.connection, self._local.pid = connection, os.getpid()
        return self._local.connection


def _seal(values: Sequence[Any]) -> str:
    """Checksum of one row: SQLite keeps none."""
    return xxhash.xxh3_64_hexdigest("\0".join(map(str, values)).encode())


def ask_all(
    questions: Iterable[Question],
    n: int,
    server: Server,
    cache: Cache,
    check: Callable[[str], Any],
    progress: bool = True,
) -> None:
    """Bring the answers of up to `n` questions into `cache`, several at a time.

    An answer for which `check` raises DataError is kept as failed, with that reason.
    Raises UsageError when a cap is reached, the key is refused, or an earlier run left doubtful
    questions; UserError when the server is dead. What was answered until then is kept.
    """
    with Progress("judge", n, progress) as bar, closing(_Asker(server, cache, check)) as asker:
        for question in asker.missing(questions, bar):
            asker.ask(question)
            bar.advance(1)
        asker.finish()


class _Asker:
    """Sends questions from a few threads; claims and commits happen in the caller's."""

    def __init__(self, server: Server, cache: Cache, check: Callable[[str], Any]) -> None:
        self.server, self.cache, self.check = server, cache, check
        self.key = os.environ.get(server.key_variable, "")
        self.client = openai.OpenAI(
            api_key=self.key or "none",
            base_url=server.url,
            max_retries=0,  # one layer of repetition: ours
            timeout=server.timeout,
        )
        self.threads = ThreadPoolExecutor(server.concurrency)
        self.pending: dict[Future[Reply], tuple[str, float]] = {}
        self.spent = server.cost(*cache.tokens())
        self.n_requests, self.lock = 0, threading.Lock()
        self.n_unanswered, self.stopping = 0, threading.Event()

    def missing(self, questions: Iterable[Question], bar: Progress) -> Iterator[Question]:
        """Those to be sent; duplicates of one under way wait for it."""
        doubtful = 0
        for question in questions:
            key = self.cache.key(question)
            under_way = {key for key, _ in self.pending.values()}
            known = None if key in under_way else self.cache.find(key)
            if key in under_way or (known and not self._again(known)):
                doubtful += known is not None and known.status == ASKED
                bar.advance(1)
            else:
                yield question
        if doubtful:
            raise UsageError(
                f"{doubtful} questions were under way when a run was killed, and may have been "
                "paid for; --judge_again doubtful asks them again"
            )

    def _again(self, known: Reply) -> bool:
        states = {"nothing": (), "doubtful": (ASKED,), "failed": (ASKED, FAILED)}
        return known.status in states[self.server.again]

    def ask(self, question: Question) -> None:
        """Claim and send, once one of the threads is free."""
        while len(self.pending) >= self.server.concurrency:
            self._collect()
        most, cap = self.server.most(question), self.server.max_cost
        if cap is not None and self.spent + sum(c for _, c in self.pending.values()) + most > cap:
            self.finish()
            raise UsageError(
                f"--judge_max_cost {cap:g}: {self.spent:.2f} is spent and the next answer may cost "
                f"{most:.4f}; the answers are kept, raise it to go on"
            )
        key = self.cache.key(question)
        self.cache.put(key, Reply(ASKED, ""))
        self.pending[self.threads.submit(self._call, question)] = (key, most)

    def finish(self) -> None:
        """Wait for everything under way and commit it."""
        while self.pending:
            self._collect()

    def close(self) -> None:
        """Commit what still comes in, whatever has gone wrong."""
        self.stopping.set()
        for future in wait(self.pending).done:
            key, _ = self.pending.pop(future)
            if future.exception() is None:
                self.cache.put(key, future.result())
            else:
                self.cache.drop(key)
        self.threads.shutdown()
        self.client.close()

    def _collect(self) -> None:
        """Commit the calls that have ended; raises what stops the run."""
        for future in wait(self.pending, return_when=FIRST_COMPLETED).done:
            error = future.exception()
            if error is None:
                key, _ = self.pending.pop(future)
                reply = future.result()
                self.cache.put(key, reply)
                self.spent += self.server.cost(reply.tokens_in, reply.tokens_out)
                self.n_unanswered = 0
                continue
            if not isinstance(error, Unanswered):
                raise error
            key, _ = self.pending.pop(future)
            self.cache.drop(key)
            self.n_unanswered += 1
            if self.n_unanswered >= DEAD_AFTER:
                raise UserError(
                    f"{self.server.url}: {self.n_unanswered} questions in a row without an answer "
                    f"({error}); the answers so far are kept, run the same command again"
                )

    # ---- in the threads ---------------------------------------------------------------------

    def _call(self, question: Question) -> Reply:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_TRANSIENT),
            wait=pause,
            stop=tenacity.stop_after_attempt(self.server.attempts)
            | tenacity.stop_when_event_set(self.stopping),
            sleep=self.stopping.wait,
            reraise=True,
        )
        try:
            return retrying(self._send, question)
        except _TRANSIENT as error:
            raise Unanswered(self._safe(error)) from None
        except _OF_THE_QUESTION as error:
            return Reply(FAILED, f"the server refuses the question: {self._safe(error)}")
        except openai.APIStatusError as error:
            where = f"the key in {self.server.key_variable}" if self.key else "no key is set"
            raise UsageError(f"{self.server.url}: {self._safe(error)} ({where})") from None
        except (openai.APIError, ValueError) as error:  # an answer that is no JSON of a chat
            return Reply(FAILED, f"the server's answer cannot be read: {self._safe(error)}")

    def _send(self, question: Question) -> Reply:
        with self.lock:
            if self.server.max_requests is not None and self.n_requests >= self.server.max_requests:
                raise UsageError(
                    f"--judge_max_requests {self.server.max_requests}: used up; the answers are "
                    "kept, run the same command again to go on"
                )
            self.n_requests += 1
        roles = zip(("system", "user"), question, strict=True)
        completion = self.client.chat.completions.create(
            model=self.server.model,
            messages=[{"role": role, "content": text} for role, text in roles],
            temperature=self.server.temperature,
            max_tokens=self.server.max_tokens,
            seed=self.server.seed,
        )
        return self._reply(completion)

    def _reply(self, completion: Any) -> Reply:
        """What a completion says; servers differ in what they leave out."""
        usage = getattr(completion, "usage", None)
        counts = [getattr(usage, f"{kind}_tokens", 0) or 0 for kind in ("prompt", "completion")]
        choices = getattr(completion, "choices", None)
        text = choices[0].message.content if choices else None
        if not isinstance(text, str):
            return Reply(FAILED, "the answer has no text", *counts)
        text = self._redacted(text)
        try:
            self.check(text)
        except DataError as error:
            return Reply(FAILED, str(error), *counts)
        return Reply(ANSWERED, text, *counts)

    def _safe(self, error: Exception) -> str:
        return self._redacted(" ".join(str(error).split())[:200])

    def _redacted(self, text: str) -> str:
        return text.replace(self.key, "***") if self.key else text


def pause(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt: what the server says, else up to 1, 2, 4, ... at random."""
    response = getattr(state.outcome.exception(), "response", None)
    asked = retry_after(None if response is None else response.headers.get("retry-after"))
    return asked if asked is not None else _BACK_OFF(state)


_BACK_OFF = tenacity.wait_random_exponential(multiplier=1, max=LONGEST_WAIT)


def retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, a number or the time until a date; a day at most.

    None for what is neither.
    """
    try:
        asked = float(value)
    except TypeError:
        return None
    except ValueError:
        try:
            asked = parsedate_to_datetime(value).timestamp() - time()
        except ValueError:
            return None
    return min(max(0.0, asked), DAY) if math.isfinite(asked) else None
