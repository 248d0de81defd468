"""`run` with a tiny real LLaVA: the same answers for any processes, crashes, batches, engine."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from llava.errors import DataError, UsageError
from llava.eval.__main__ import main
from llava.eval.records import read_attacks
from llava.eval.run import Evaluation
from llava.eval.settings import RunSettings
from llava.images import BadImage
from llava.launch import process
from tests.faults import faulty_os
from tests.llava.eval.small import save_mmbench, save_pope
from tests.tiny_models import save_llava

N = 4
FILES = ("answers.jsonl", "attacks.jsonl")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`model/`, `mmbench/` (four questions of three options, two rows each), `pope/`."""
    root = tmp_path_factory.mktemp("world")
    (root / "model").mkdir()
    save_llava(root / "model")
    save_mmbench(root / "mmbench", N)
    save_pope(root / "pope", 3)
    return root


@pytest.fixture(scope="module")
def plain(world):
    """Settings of a run over MMBench by one process."""
    return RunSettings(
        benchmark="mmbench",
        data=str(world / "mmbench"),
        model=str(world / "model"),
        out=str(world / "plain"),
        max_new_tokens=3,
        dtype="float32",
        device="cpu",
    )


@pytest.fixture(scope="module")
def reference(plain):
    """Its folder."""
    return Evaluation(plain).execute()


@pytest.fixture
def again(plain, tmp_path):
    """The same settings with changes, into a folder of its own."""
    return lambda **changes: dataclasses.replace(plain, out=str(tmp_path / "out"), **changes)


def contents(out):
    return [(out / name).read_bytes() for name in FILES]


def replies(out):
    """Texts by everything that tells a prompt."""
    _, records = read_attacks(out / "attacks.jsonl")
    return {(r.row, r.symbols, tuple(r.order)): r.text for r in records}


def numbers(out):
    return json.loads((out / "summary.json").read_text())["readings"]


def part_lines(out):
    lines = [p.read_text().splitlines() for p in sorted((out / "parts").iterdir())]
    return [json.loads(line)["unit"] for part in lines for line in part if line]


def test_a_run_leaves_everything(reference):
    names = {path.name for path in reference.iterdir()}
    written = {*FILES, "summary.json", "manifest.json", "run.json", "parts", "submission"}
    assert names == written
    assert (reference / "submission" / "mmbench.xlsx").stat().st_size > 0
    assert len((reference / "answers.jsonl").read_text().splitlines()) == 2 * N
    summary = json.loads((reference / "summary.json").read_text())
    assert (summary["benchmark"], summary["model"], summary["n_items"]) == ("mmbench", "model", 8)
    for reading in summary["readings"].values():
        block = reading["counted"]
        assert block["pa"] <= block["clean"] and block["sa_pa"] <= block["sa"]
        assert set(reading["groups"]) == {"shape", "colour"}


def test_answers_are_scored_as_the_run_says(reference, world, capsys):
    data, answers = str(world / "mmbench"), str(reference / "answers.jsonl")
    main(["score", "--benchmark", "mmbench", "--data", data, "--answers", answers, "--json"])
    scored = json.loads(capsys.readouterr().out)
    assert scored == json.loads((reference / "summary.json").read_text())["published"]
    block = numbers(reference)["exact"]["counted"]
    assert scored["per_row"] == pytest.approx(block["clean"])


def test_attack_says_what_the_run_says(reference, capsys):
    main(["attack", str(reference), "--json"])
    assert json.loads(capsys.readouterr().out)["readings"] == numbers(reference)


def test_rotations_are_asked_once(reference):
    assert sorted(part_lines(reference)) == list(range(N))
    _, records = read_attacks(reference / "attacks.jsonl")
    records = list(records)
    assert len(records) == 2 * N * 12
    said = {}
    for record in records:
        assert record.same == (None if record.row < N else record.row - N)
        said.setdefault((record.row % N, record.prompt), set()).add(record.text)
    assert len(said) == N * 12 and all(len(texts) == 1 for texts in said.values())


def test_the_prompt_of_a_record_is_what_its_fields_say(reference):
    _, records = read_attacks(reference / "attacks.jsonl")
    for record in records:
        lines = record.prompt.split("\n")[1:-1]
        assert [line[0] for line in lines] == list(record.symbols)
        assert record.options == dict(zip(record.symbols, record.order, strict=True))


def test_naive_agrees(reference, again):
    out = Evaluation(again(engine="naive")).execute()
    assert replies(out) == replies(reference) and numbers(out) == numbers(reference)


def test_small_batches_agree(reference, again):
    out = Evaluation(again(max_tokens=100)).execute()
    assert replies(out) == replies(reference)


def test_stopping_early_agrees_in_the_row(reference, again):
    out = Evaluation(again(orders="until_failure")).execute()
    assert len(replies(out)) < len(replies(reference))
    assert replies(out).items() <= replies(reference).items()
    for reading, blocks in numbers(out).items():
        row = {name: blocks["counted"][name] for name in ("clean", "pa", "sa", "sa_pa", "avg")}
        assert row.items() <= numbers(reference)[reading]["counted"].items()


def test_without_attacks_the_answers_are_the_same(reference, again):
    out = Evaluation(again(attacks="clean", batch_size=3)).execute()
    given = {key: text for key, text in replies(reference).items() if key[1:] == ("ABC", (0, 1, 2))}
    assert replies(out) == given
    assert "pa" not in numbers(out)["exact"]["counted"]


def test_a_finished_run_is_not_asked_again(reference, plain):
    before = contents(reference), (reference / "manifest.json").stat().st_mtime_ns
    assert Evaluation(plain).execute() == reference
    assert before == (contents(reference), (reference / "manifest.json").stat().st_mtime_ns)


def test_another_run_does_not_get_the_folder(reference, plain):
    other = dataclasses.replace(plain, symbols="snvf")
    with pytest.raises(UsageError, match="holds another run.*symbols: .*QWER.*SNVF"):
        Evaluation(other).execute()


def test_symbols_that_the_model_cannot_tell_apart_are_noted(again, capsys):
    """The tiny vocabulary spells W and E by their bytes, after one token for both."""
    Evaluation(again(limit=1)).execute()
    assert "note: some of QWE begin with the same token in this model" in capsys.readouterr().err


# ---- processes


def start(process):
    """Run `process` in a forked process; its id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where `&` started us
        try:
            process()
            status = 0
        except SystemExit as end:
            status = end.code
        finally:
            os._exit(status)
    return pid


def ended(pid):
    """How a process ended: its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def work(settings, rank, size, at=None):
    """A process of a run; killed before call `at` to the file system, if given."""

    def process():
        with faulty_os(at, "kill"):
            Evaluation(settings, rank, size).execute()

    return process


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_does_its_share_and_then_the_rest(again, reference, rank):
    out = Evaluation(again(), rank, 2).execute()
    assert contents(out) == contents(reference)
    assert part_lines(out)[0] == (0, N // 2)[rank]


@pytest.mark.parametrize("size", [1, 2])
def test_killed_and_resumed_gives_the_same_files(again, reference, size):
    """SIGKILL in the second unit: no number before the rest is asked, nothing is asked twice."""
    settings = again()
    with faulty_os() as calls:
        Evaluation(settings, 0, size).execute()
    out = Evaluation(settings, 0, size).execute()
    first = calls.calls.index("write", calls.calls.index("write") + 1)
    for path in sorted(out.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    second = calls.calls.index("write", first + 1)
    assert ended(start(work(settings, 0, size, second))) == -signal.SIGKILL
    assert not (out / "summary.json").exists() and len(part_lines(out)) == 1
    with pytest.raises(UsageError):
        main(["attack", str(out)])
    Evaluation(settings, 0, 1).execute()
    assert sorted(part_lines(out)) == list(range(N))
    assert contents(out) == contents(reference)


def test_when_one_of_two_processes_is_killed_no_item_is_missing(again, reference):
    """The other one asks what the dead one did not."""
    settings = again()
    pids = [start(work(settings, 0, 2, at=14)), start(work(settings, 1, 2))]
    assert [ended(pid) for pid in pids] == [-signal.SIGKILL, 0]
    out = Path(settings.out)
    assert (out / "manifest.json").exists()
    assert set(part_lines(out)) == set(range(N))
    assert contents(out) == contents(reference)


def test_two_processes_of_a_launch(again, reference, tmp_path):
    """As torchrun starts them, at the same time; rank 0 prints."""
    settings = again()
    words = ["run", "--benchmark", "mmbench", "--data", settings.data, "--model", settings.model]
    words += ["--out", settings.out, "--max-new-tokens", "3", "--device", "cpu"]

    def process(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
        with (tmp_path / str(rank)).open("w") as sys.stdout:
            main(words)

    pids = [start(lambda rank=rank: process(rank)) for rank in range(2)]
    assert [ended(pid) for pid in pids] == [0, 0]
    first, second = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert first.startswith("mmbench: model, 8 items, symbols QWERT..., exhaustive orders\n")
    assert second == ""
    assert contents(Path(settings.out)) == contents(reference)
    assert set(part_lines(Path(settings.out))) == set(range(N))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_what_is_finished(again, tmp_path, number):
    """130 for ^C; the shell calls the end by SIGTERM 143."""
    settings = again(data=str(save_mmbench(tmp_path / "many", 60, rotations=1)))
    pid = start(lambda: process(lambda: Evaluation(settings).execute()))
    out = Path(settings.out)
    part = out / "parts" / "0.jsonl"
    while not part.exists() or b"\n{" not in part.read_bytes():  # there before its first unit is
        time.sleep(0.01)
    os.kill(pid, number)
    assert ended(pid) == {signal.SIGINT: 130, signal.SIGTERM: -signal.SIGTERM}[number]
    assert not (out / "manifest.json").exists()
    assert 0 < len(part.read_bytes().split(b"\n{")) - 1 < 60


# ---- open questions


@pytest.fixture
def pope(plain, world, tmp_path):
    def settings(**changes):
        values = {"benchmark": "pope", "data": str(world / "pope"), "out": str(tmp_path / "out")}
        return dataclasses.replace(plain, **values | changes)

    return settings


def test_open_questions(pope, world, capsys):
    out = Evaluation(pope(batch_size=2)).execute()
    alone = Evaluation(pope(batch_size=1, out=pope().out + "-alone")).execute()
    assert (out / "answers.jsonl").read_bytes() == (alone / "answers.jsonl").read_bytes()
    assert not (out / "attacks.jsonl").exists()
    assert len((out / "answers.jsonl").read_text().splitlines()) == 9
    assert sorted(part_lines(out)) == list(range(3))  # the categories ask the same
    summary = json.loads((out / "summary.json").read_text())
    answers = str(out / "answers.jsonl")
    data = str(world / "pope")
    main(["score", "--benchmark", "pope", "--data", data, "--answers", answers, "--json"])
    assert json.loads(capsys.readouterr().out) == summary["published"]


def test_how_long_an_answer_may_be(again, pope):
    for settings, default in ((again, 16), (pope, 128)):
        assert Evaluation(settings()).engine.max_new_tokens == 3
        assert Evaluation(settings(max_new_tokens=None)).engine.max_new_tokens == default


def test_the_first_items_only(pope):
    out = Evaluation(pope(limit=4)).execute()
    assert len((out / "answers.jsonl").read_text().splitlines()) == 4
    assert json.loads((out / "summary.json").read_text())["limit"] == 4


# ---- what cannot be


@pytest.fixture
def told(capsys):
    """Exit code and error line of a command."""

    def run(*words):
        with pytest.raises(SystemExit) as end:
            process(lambda: main([str(word) for word in words]))
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return end.value.code, err

    return run


@pytest.fixture
def asked(world, tmp_path):
    """The words of a run whose model is not there: whatever is told, is told before it is read."""
    return lambda name, data: [
        *("run", "--benchmark", name, "--data", data),
        *("--model", tmp_path / "no model", "--out", tmp_path / "out"),
    ]


def test_a_missing_picture_is_told_before_the_model_is_read(told, asked, tmp_path):
    folder = save_pope(tmp_path / "pope", 2)
    (folder / "val2014" / "1.png").unlink()
    code, err = told(*asked("pope", folder))
    assert code == 65 and "item 1: image '1.png': no such file under" in err
    (folder / "val2014" / "1.png").write_bytes(b"picture")
    code, err = told(*asked("pope", folder))
    assert code == 65 and "item 1: image '1.png': not an image" in err


def test_pictures_elsewhere(told, asked, tmp_path):
    folder = save_pope(tmp_path / "pope", 2)
    (folder / "val2014").rename(tmp_path / "coco")
    assert told(*asked("pope", folder))[0] == 65
    code, err = told(*asked("pope", folder), "--images", tmp_path / "nowhere")
    assert code == 2 and "--images" in err and "no such folder" in err
    code, err = told(*asked("pope", folder), "--images", tmp_path / "coco")
    assert "no model" in err


def test_a_damaged_picture_in_a_table(again, tmp_path):
    folder = save_mmbench(tmp_path / "damaged", 1)
    path = folder / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("iVBOR", "AAAAA"))
    with pytest.raises(BadImage, match="item 0: image 'number 0': not an image") as error:
        Evaluation(again(data=str(folder))).execute()
    assert isinstance(error.value, BadImage) and error.value.exit_code == DataError.exit_code


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--symbols", "QW"], "--symbols QW: 2 symbols, but a question has 3 options"),
        (["--limit", "0"], "--limit 0: give a number of at least 1"),
        (["--attacks", "some"], "--attacks some: expected"),
        (["--orders", "few"], "--orders few: expected"),
        (["--engines", "naive"], "--engines: no such flag (did you mean --engine?)"),
    ],
)
def test_wrong_flags(told, asked, world, words, problem):
    code, err = told(*asked("mmbench", world / "mmbench"), *words)
    assert code == 2 and problem in err


def test_a_file_without_right_answers_is_told_before_the_model_is_read(told, asked, tmp_path):
    folder = save_mmbench(tmp_path / "test", 1)
    path = folder / "mmbench_dev_20230712.tsv"
    path.write_text(path.read_text().replace("\tanswer\t", "\tnothing\t"))
    code, err = told(*asked("mmbench", folder))
    assert code == 2 and "no right answers" in err


def test_score_writes_the_files_to_submit(reference, world, tmp_path):
    words = ["--data", str(world / "mmbench"), "--answers", str(reference / "answers.jsonl")]
    main(["score", "--benchmark", "mmbench", *words, "--submission", str(tmp_path / "s")])
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["mmbench.xlsx"]
