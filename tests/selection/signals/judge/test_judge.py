"""The LLM score against a real HTTP server that fails in every way we know of (P20, P21)."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from llava.errors import DataError, StorageError, UsageError, UserError
from llava.launch import process
from selection.extract.loop import extract_signal
from selection.pool.pool import Pool
from selection.settings import PoolSettings, ProxySettings
from selection.signals.judge import asking
from selection.signals.judge.judge import Judge, question_of, score_in
from selection.store.store import StoreReader
from tests.extraction import as_rank, fork
from tests.faults import snapshot
from tests.judges import KEY, judge_server

N = 12
WORKER = Path(__file__).with_name("judge_worker.py")
BUSY = (429, {"retry-after": "0.3"}, "slow down")
BROKEN = (500, {}, "oops")


@pytest.fixture
def pool(tmp_path):
    turns = [("human", "Say sample{}."), ("gpt", "It is sample{} end.")]
    records = [
        {"id": i, "conversations": [{"from": r, "value": t.format(i)} for r, t in turns]}
        for i in range(N)
    ]
    (tmp_path / "pool.json").write_text(json.dumps(records))
    return Pool.open(tmp_path / "pool.json")


@pytest.fixture
def ask(pool, tmp_path, monkeypatch):
    """Run the judge over the pool; the store's reader."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    # the pauses themselves are tested apart
    monkeypatch.setattr(asking, "_BACK_OFF", lambda state: 0.01)

    def ask(judge, store="store", max_bad=1.0, **settings):
        made = Judge(
            judge_url=judge.url,
            judge_cache=str(tmp_path / "judge.sqlite"),
            **{f"judge_{name}": value for name, value in settings.items()},
        )
        proxy = ProxySettings(store=str(tmp_path / store), device="cpu", max_bad=max_bad)
        where = PoolSettings(str(pool.path))
        return extract_signal(made, np.arange(N), pool, where, proxy)

    return ask


def number(text: str) -> int:
    return int(text.split("sample")[1].split(".")[0])


def by_number(text: str) -> str:
    return f"{number(text) % 11}\nBecause."


def test_every_sample_has_its_mark_and_is_asked_once(ask, pool):
    with judge_server(by_number) as judge:
        reader = ask(judge)
        again = ask(judge, store="another")  # the answers are on disk
    assert reader.column("llm_score").tolist() == [i % 11 for i in range(N)]
    assert again.column("llm_score").tobytes() == reader.column("llm_score").tobytes()
    assert set(judge.asked.values()) == {1} and len(judge.asked) == N
    assert judge.keys == {f"Bearer {KEY}"}
    body = judge.bodies[0]
    assert (body["model"], body["temperature"], body["seed"]) == ("deepseek-chat", 1.3, 42)
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    assert "scale of 0 to 10" in body["messages"][1]["content"]


@pytest.mark.parametrize("fault", [BUSY, BROKEN, "cut", 1.0], ids=["429", "500", "cut", "slow"])
def test_what_fails_for_a_while_is_asked_again_and_paid_once(ask, fault):
    with judge_server(by_number) as judge:
        judge.faults = {"sample3.": [fault] * 2, "sample5.": [fault]}
        reader = ask(judge, timeout=0.5)
        time.sleep(1.2 if fault == 1.0 else 0)  # let slow answers arrive, to nobody
    assert reader.column("llm_score").tolist() == [i % 11 for i in range(N)]
    tries = Counter({number(text): n for text, n in judge.asked.items()})
    assert tries == Counter(dict.fromkeys(range(N), 1) | {3: 3, 5: 2})
    if fault != 1.0:  # a server that answers too late may count an answer nobody has read
        assert set(judge.paid.values()) == {1}


def test_retry_after_is_honoured(ask):
    with judge_server() as judge:
        judge.faults = {"sample3.": [BUSY]}
        ask(judge)
    first, second = (t for text, t in judge.times if number(text) == 3)
    assert second - first >= 0.3


BAD = {
    "prose": "I would say it is good.",
    "refusal": "I'm sorry, but I can't assist with that.",
    "another language": "我给八分",
    "negative": "-3",
    "too large": "11",
    "of another scale": "8/5",
    "two numbers": "7 8",
    "empty": "",
    "not a number": "nan",
    "null": None,
    "no text": ["8"],
}


@pytest.mark.parametrize("answer", BAD.values(), ids=BAD)
def test_an_answer_that_is_no_mark_is_never_a_score(ask, answer):
    with judge_server(lambda t: answer if number(t) == 4 else "8") as judge:
        reader = ask(judge)
        ask(judge, store="another")
    (bad,) = reader.bad
    assert bad["row"] == 4 and "answer" in bad["reason"]
    assert np.isnan(reader.column("llm_score")[4])
    assert (np.delete(reader.column("llm_score"), 4) == 8).all()
    assert set(judge.asked.values()) == {1}  # paid for, so not asked again by itself


def test_a_failed_answer_can_be_asked_again(ask):
    marks = ["no idea", "9"]
    with judge_server(lambda t: marks.pop(0) if number(t) == 4 else "8") as judge:
        ask(judge)
        reader = ask(judge, store="another", again="failed")
    assert reader.bad == [] and reader.column("llm_score")[4] == 9
    assert {number(t): n for t, n in judge.asked.items()} == dict.fromkeys(range(N), 1) | {4: 2}


@pytest.mark.parametrize(
    "text, mark",
    [
        ("8", 8),
        ("8.5\nwell", 8.5),
        ("8/10", 8),
        ("0", 0),
        ("10", 10),
        ("Score: 7", 7),
        ("**9**", 9),
        (" 6 .\n", 6),
        ("Rating: 7 out of 10", 7),
    ],
)
def test_marks(text, mark):
    assert score_in(text) == mark


@pytest.mark.parametrize("text", ["-1", "10.1", "99", "8/100", "about 8", "8 or 9", "1e1", ""])
def test_no_marks(text):
    with pytest.raises(DataError, match="no mark"):
        score_in(text)


@pytest.mark.parametrize("fault", [(400, {}, "content filter"), "no json"], ids=["400", "no json"])
def test_a_question_the_server_cannot_take_fails_alone(ask, fault):
    with judge_server() as judge:
        judge.faults = {"sample4.": [fault]}
        reader = ask(judge)
        assert [bad["row"] for bad in reader.bad] == [4]
        assert np.isnan(reader.column("llm_score")[4])
        assert ask(judge, store="b").bad[0]["row"] == 4  # known to have failed
        assert ask(judge, store="c", again="failed").bad == []
    assert {number(t): n for t, n in judge.asked.items()}[4] == 2


def test_a_question_without_an_answer_is_listed_and_asked_by_the_next_run(ask):
    with judge_server() as judge:
        judge.faults = {"sample4.": [BROKEN] * 3}
        reader = ask(judge, attempts=3)
        assert [bad["reason"] for bad in reader.bad] == ["the judge gave no answer"]
        assert ask(judge, store="another").bad == []


def test_a_dead_server_ends_the_run_and_a_refused_key_at_once(ask):
    with judge_server() as judge:
        judge.faults = {"sample": [BROKEN] * 100}
        with pytest.raises(UserError, match="10 questions in a row"):
            ask(judge, attempts=1, concurrency=1)
        assert sum(judge.asked.values()) == 10
        judge.faults = {"sample": [(401, {}, f"bad key {KEY}")] * 100}
        with pytest.raises(UsageError, match=r"bad key \*\*\* .the key in OPENAI_API_KEY") as error:
            ask(judge, concurrency=1)
        assert KEY not in str(error.value) and sum(judge.asked.values()) == 11
        judge.faults = {}
        assert ask(judge).bad == []


def test_caps_on_requests_and_cost_stop_before_they_are_passed(ask):
    with judge_server() as judge:
        with pytest.raises(UsageError, match="--judge_max_requests 5"):
            ask(judge, max_requests=5)
        assert sum(judge.asked.values()) == 5
        # 100 tokens read and 2 written cost 0.104; the estimate of one is higher
        with pytest.raises(UsageError, match="--judge_max_cost 1: 0.[67]"):
            ask(judge, max_cost=1.0, prices=(1000.0, 2000.0))
        assert sum(judge.paid.values()) * 0.104 <= 1.0
        assert ask(judge).bad == [] and sum(judge.asked.values()) == N


def test_concurrency_is_what_was_asked_for(ask):
    with judge_server() as judge:
        judge.faults = {"sample": [0.3] * N}
        ask(judge, concurrency=3)
    assert judge.most_busy == 3


def test_equal_conversations_are_paid_for_once(ask, tmp_path, pool):
    records = json.loads(pool.path.read_text())
    for record in records:
        record["conversations"] = records[0]["conversations"]
    pool.path.write_text(json.dumps(records))
    cache, server = tmp_path / "judge.sqlite", None
    with judge_server() as judge:
        server = Judge(judge_url=judge.url).server
        questions = [question_of(Pool.open(pool.path).record(row)) for row in range(N)]
        asking.ask_all(questions, N, server, asking.Cache(cache, server), score_in, False)
    assert sum(judge.asked.values()) == 1


def test_a_forecast_sends_nothing_and_says_the_cost(ask, pool, tmp_path):
    with judge_server() as judge:
        made = Judge(
            judge_url=judge.url, judge_cache=str(tmp_path / "j.sqlite"), judge_prices=(1.0, 2.0)
        )
        told = made.forecast(
            made.open_model(pool, {}, ProxySettings(device="cpu")), pool, np.arange(N)
        )
        assert told.startswith(f"{N} questions to deepseek-chat, at most about 0.00")
        assert not judge.asked


def test_repetitions_count_as_requests(ask):
    with judge_server() as judge:
        judge.faults = {"sample": [BROKEN] * 100}
        with pytest.raises(UsageError, match="--judge_max_requests 7"):
            ask(judge, max_requests=7, attempts=5, concurrency=3)
    assert sum(judge.asked.values()) == 7


def test_what_decides_an_answer_is_asked_again_and_the_rest_is_not(ask):
    with judge_server(by_number) as judge:
        first = ask(judge)
        for i, same in enumerate([{"concurrency": 1}, {"timeout": 9.0}, {"prices": (1.0, 1.0)}]):
            assert ask(judge, store=f"same{i}", **same).fingerprint == first.fingerprint
        assert sum(judge.asked.values()) == N
        others = {"model": "x", "temperature": 0.0, "max_tokens": 5, "seed": 1}
        for i, (name, value) in enumerate(others.items(), 2):
            assert ask(judge, **{name: value}).fingerprint != first.fingerprint, name
            assert sum(judge.asked.values()) == i * N, name


ANSWERS = {"say": "{}", "mark": "8\n{}", "refuse": (400, {}, "no {}"), "deny": (401, {}, "no {}")}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_a_key_that_the_server_says_back_is_cut_out(ask, tmp_path, answer, capfd):
    text = answer if isinstance(answer, str) else answer[2]
    with judge_server(lambda _: text.format(KEY)) as judge:
        if isinstance(answer, tuple):
            judge.faults = {"sample": [(*answer[:2], text.format(KEY))] * 100}
        try:
            told = str(ask(judge).bad)
        except UsageError as error:
            told = str(error)
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert b"***" in told.encode() + b"".join(files)
    for found in (*files, told.encode(), *(part.encode() for part in capfd.readouterr())):
        assert KEY.encode() not in found


@pytest.mark.parametrize("damage", ["mark", "header", "no file"])
def test_a_cache_that_is_damaged_or_cannot_be_opened_is_one_line_and_gives_no_mark(
    ask, tmp_path, damage
):
    cache, same = tmp_path / "judge.sqlite", {"concurrency": 1}
    with judge_server(lambda _: "8") as judge:
        ask(judge, **same)
        with closing(sqlite3.connect(cache)) as connection:
            if damage == "mark":  # what a flipped bit in the right place does
                update = "UPDATE answers SET text = '9' WHERE key = (SELECT MAX(key) FROM answers)"
                assert connection.execute(update).rowcount == 1
                connection.commit()
            assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        if damage == "header":
            cache.write_bytes(b"no data base" + cache.read_bytes()[12:])
        if damage == "no file":  # cannot be opened, not even by root
            shutil.move(cache, tmp_path / "aside")
            cache.mkdir()
        for path in tmp_path.glob("judge.sqlite-*"):
            path.unlink()
        with pytest.raises(StorageError, match="judge.sqlite: (damaged|cannot write)") as error:
            ask(judge, store="another", **same)
        assert error.value.exit_code == 74 and "\n" not in str(error.value)
        assert set(judge.asked.values()) == {1} and len(judge.asked) == N


# ---- several processes ---------------------------------------------------------------------------


def test_two_processes_ask_once_and_change_no_byte(ask, tmp_path):
    with judge_server(by_number) as judge:
        one = ask(judge).folder
        for path in tmp_path.glob("judge.sqlite*"):
            path.unlink()
        with socket.socket() as found:
            found.bind(("localhost", 0))
            port = found.getsockname()[1]

        def work(rank: int) -> None:
            os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
            as_rank(rank, 2, lambda: ask(judge, store="two"))

        pids = [fork(lambda rank=rank: work(rank)) for rank in range(2)]
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert snapshot(tmp_path / "two" / one.name) == snapshot(one)
    assert set(judge.asked.values()) == {2}  # once for each cache


def test_without_room_for_an_answer_what_was_committed_is_not_paid_again(ask, tmp_path, capfd):
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, 64 * 1024))
        try:
            process(lambda: ask(judge, concurrency=3))
        except SystemExit as end:
            os._exit(end.code)

    with judge_server(by_number) as judge:
        status = os.waitstatus_to_exitcode(os.waitpid(fork(limited), 0)[1])
        said = capfd.readouterr().err
        assert status == 74 and said.count("error:") == 1 and "Traceback" not in said, said
        assert "judge.sqlite: cannot write" in said
        paid = sum(judge.paid.values())
        assert 0 < paid < N
        reader = ask(judge, again="doubtful")
    assert reader.column("llm_score").tolist() == [i % 11 for i in range(N)]
    assert sum(judge.asked.values()) - N <= 3 < paid  # what was under way, when told to


# ---- kills and keys, in real processes -----------------------------------------------------------


def worker(pool, store: Path, url: str, *again: str) -> subprocess.Popen:
    command = [sys.executable, str(WORKER), str(pool.path), str(store), url, *again]
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def command_lines() -> Iterator[bytes]:
    """Of every process of the machine that is still there when it is looked at."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield path.read_bytes()


def test_killed_in_the_middle_no_question_is_paid_twice_and_the_key_is_nowhere(pool, tmp_path):
    store = tmp_path / "store"
    with judge_server(by_number) as judge:
        judge.faults = {"sample": [0.15] * N}
        process = worker(pool, store, judge.url)
        while sum(judge.paid.values()) < 4 and process.poll() is None:
            time.sleep(0.01)
        running = list(command_lines())
        assert any(str(WORKER).encode() in line for line in running)
        os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[0]
        time.sleep(0.3)  # what was under way is answered, to nobody
        judge.faults = {}
        process = worker(pool, store, judge.url)
        second = process.communicate()[0]
        assert process.returncode == 2 and b"--judge_again doubtful" in second, second
        assert set(judge.asked.values()) == {1} and len(judge.asked) == N
        process = worker(pool, store, judge.url, "doubtful")
        third = process.communicate()[0]
        assert process.returncode == 0, third
    twice = sum(n - 1 for n in judge.asked.values())
    assert 1 <= twice <= 3  # only what was under way, and only when told to
    (folder,) = store.glob("judge-*")
    assert StoreReader.open(folder).column("llm_score").tolist() == [i % 11 for i in range(N)]
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    for text in (*files, *running, said, second, third):
        assert KEY.encode() not in text
