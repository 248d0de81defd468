"""`python -m llava.eval score`, on a benchmark written here and on the small world's ScienceQA."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import llava.eval.tasks
from llava.eval.__main__ import VERBS, main
from llava.eval.run import Evaluation
from llava.eval.settings import RunSettings
from llava.launch import process

FIXTURE = Path(__file__).parents[3] / "mini" / "fixture" / "eval"
TOY = '''
"""A benchmark in one file, as a user adds it."""

import json

from llava.eval.tasks.base import Item, Task, percent


class Toy(Task):
    name = "toy"

    def read(self, data):
        return [Item(id=i, prompt="?", answers=(a,)) for i, a in json.loads(data.read_text())]

    def score(self, items, texts):
        right = [texts.get(item.id) == item.answers[0] for item in items]
        answered = percent(sum(right), len(texts))
        return {"accuracy": percent(sum(right), len(items)), "of answered": answered}
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A further folder of benchmarks, and a question file of three items."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "toy.py").write_text(TOY)
    monkeypatch.setattr(
        llava.eval.tasks, "__path__", [*llava.eval.tasks.__path__, str(tmp_path / "more")]
    )
    data = tmp_path / "questions.json"
    data.write_text(json.dumps([[1, "A"], [2, "B"], ["3", "C"]]))
    yield data
    sys.modules.pop("llava.eval.tasks.toy", None)


@pytest.fixture
def score(toy, tmp_path, capsys):
    """Write answers, run the verb; returns exit code, output and errors."""

    def run(answers, *flags, benchmark="toy"):
        path = tmp_path / "answers.jsonl"
        path.write_text(lines(answers))
        words = ["score", "--benchmark", benchmark, "--data", str(toy), "--answers", str(path)]
        try:
            process(lambda: main([*words, *flags]))
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def lines(answers):
    records = [{"question_id": i, "prompt": "?", "text": text} for i, text in answers]
    return "".join(json.dumps(record) + "\n" for record in records)


def test_the_table(score):
    code, out, err = score([(1, "A"), (2, "B"), (3, "A")])
    assert (code, err) == (0, "")
    assert out == "accuracy      66.67\nof answered   66.67\n"


def test_json_is_one_object_of_percentages(score):
    code, out, err = score([(1, "A"), (2, "B"), ("3", "C")], "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"accuracy": 100, "of answered": 100}


def test_missing_answers_stop_the_program(score):
    code, out, err = score([(2, "B")])
    assert (code, out) == (65, "")
    assert err.count("\n") == 1
    assert "answers.jsonl: of 3 items, without an answer: 2 (the first is 1); " in err
    assert "--allow-missing" in err


def test_missing_answers_allowed_are_counted_and_scored_by_the_benchmark(score):
    code, out, err = score([(2, "B")], "--allow-missing", "--json")
    assert code == 0
    assert (
        "of 3 items, without an answer, scored by the benchmark's rule: 2 (the first is 1)" in err
    )
    assert json.loads(out) == {"accuracy": pytest.approx(100 / 3), "of answered": 100}


def test_repeated_and_unknown_ids_are_said_and_the_numbers_stay_clean(score):
    code, out, err = score([(1, "B"), (2, "B"), (3, "C"), (8, "A"), (1, "A")], "--json")
    assert code == 0
    repeated, unknown = err.splitlines()
    assert "records replaced, because the last one of an id counts: 1 (the first is 1)" in repeated
    assert "ids that no item has, left out: 1 (the first is '8')" in unknown
    assert json.loads(out) == {"accuracy": 100, "of answered": 100}


@pytest.mark.parametrize("flags", [(), ("--allow-missing",)])
def test_answers_to_other_questions(score, flags):
    code, out, err = score([("x", "A")], *flags)
    assert (code, out) == (65, "")
    assert err.count("\n") == 1
    assert "answers no item of the benchmark; its first id is 'x', the benchmark's 1; " in err


@pytest.mark.parametrize(("name", "near"), [("toi", "toy"), ("scienceqa", "sqa")])
def test_an_unknown_benchmark(score, name, near):
    code, out, err = score([(1, "A")], benchmark=name)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: --benchmark {name}: did you mean {near}? there are ")
    assert err.count("\n") == 1


def test_flags_are_answered_without_loading_a_library_that_takes_seconds():
    code = f"""
import sys
from llava.eval.__main__ import main
from llava.launch import process
for verb in {VERBS}:
    for flag in ("--help", "--no-such-flag"):
        try:
            process(lambda: main([verb, flag]))
            code = 0
        except SystemExit as end:
            code = end.code
        print(verb, flag, code)
print({{"torch", "transformers", "scipy", "matplotlib"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    for verb in VERBS:
        assert f"{verb} --help 0\n{verb} --no-such-flag 2\n" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"
    assert done.stderr.count("no such flag") == len(VERBS)


def test_data_are_looked_for_where_llava_has_them(toy, tmp_path, monkeypatch):
    """Below playground/data/eval, in the folder that the benchmark names; for both verbs."""
    folder = tmp_path / "playground" / "data" / "eval" / "toys"
    folder.mkdir(parents=True)
    (folder / "questions.json").write_text('[["1", "A"]]')
    module = tmp_path / "more" / "toy.py"
    source = module.read_text().replace('name = "toy"', 'name, folder = "toy", "toys"')
    module.write_text(source.replace("data.read_text()", '(data / "questions.json").read_text()'))
    (tmp_path / "a.jsonl").write_text(lines([(1, "A")]))
    monkeypatch.chdir(tmp_path)
    main(["score", "--benchmark", "toy", "--answers", "a.jsonl"])
    evaluation = Evaluation(RunSettings(benchmark="toy", model="none", out="out"))
    assert evaluation.settings.data == "playground/data/eval/toys"
    assert [item.id for item in evaluation.items] == ["1"]


# ---- ScienceQA in the small world's files


@pytest.fixture
def scienceqa():
    """Folder and items (id, right letter, has a picture) of the small world's ScienceQA."""
    folder = FIXTURE / "scienceqa"
    if not folder.is_dir():
        pytest.skip(f"the small world is not present: {folder}")
    items = json.loads((folder / "llava_test_CQM-A.json").read_text())
    return folder, [(i["id"], i["conversations"][1]["value"], "image" in i) for i in items]


def science(folder, answers, path, *flags):
    """The verb in a process of its own, with answer records as LLaVA's `model_vqa_science`'s."""
    path.write_text(
        "".join(
            json.dumps(
                {
                    "question_id": i,
                    "prompt": "<image>\nWhich?" if image else "Which?",
                    "text": text,
                    "answer_id": "jwTZ7aUXrj2AkB",
                    "model_id": "llava-v1.5-7b",
                    "metadata": {},
                }
            )
            + "\n"
            for i, text, image in answers
        )
    )
    words = "-m llava.eval score --benchmark sqa --data".split()
    command = [sys.executable, *words, folder, "--answers", path, *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_scienceqa_total_and_image(scienceqa, tmp_path):
    """Every reading rule of LLaVA's script; all text-only items wrong."""
    folder, items = scienceqa
    forms = ["{}", "{}. of course", "The answer is {}.", "{}"]
    answers = [
        (i, forms[n % 4].format(letter) if image else "none of them", image)
        for n, (i, letter, image) in enumerate(items)
    ]
    done = science(folder, answers, tmp_path / "a.jsonl", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    share = sum(image for *_, image in items) / len(items)
    assert 0 < share < 1
    assert json.loads(done.stdout) == {
        "total": pytest.approx(100 * share),
        "image": 100,
        "parse_failures": pytest.approx(100 * (1 - share)),
    }


def test_scienceqa_without_an_answer(scienceqa, tmp_path):
    folder, items = scienceqa
    done = science(folder, items[1:], tmp_path / "a.jsonl")
    assert (done.returncode, done.stdout) == (65, "")
    assert f"without an answer: 1 (the first is '{items[0][0]}')" in done.stderr
    done = science(folder, items[1:], tmp_path / "a.jsonl", "--allow-missing", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["total"] == pytest.approx(100 - 100 / len(items))
