"""Models whose numbers are known beforehand get just those, through the engines and whole runs."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from llava.eval.engine import ENGINES, open_engine
from llava.eval.question import Ask, Question, orders
from llava.eval.run import Evaluation
from llava.eval.settings import RunSettings
from tests.oracles import first_position, knows, oracle, uniform

COLOURS = ("red", "green", "large blue", "yellow")
LETTER = "Answer with the option's letter from the given choices directly."


def right(question: str) -> str:
    """Every question says what it wants."""
    return question.partition("Which is ")[2].partition("?")[0]


def questions(n_options: int, n_rounds: int) -> list[tuple[Question, int]]:
    """Question and number of the right option; each option is right equally often."""
    items = []
    for i, gold in itertools.product(range(n_rounds), range(n_options)):
        options = COLOURS[i % 4 :] + COLOURS[: i % 4]
        stem = f"Question {i}: Which is {options[gold]}?"
        items.append((Question(stem, options[:n_options], LETTER), gold))
    return items


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tmp_path_factory.mktemp("oracles") / "parts"


def answers(vlm, name: str, items: list[tuple[Question, int]], symbols: str) -> np.ndarray:
    """Whether each item (I,) was right in each order (O,) under the symbols, read exactly."""
    engine, right = open_engine(name, vlm), []
    for question, gold in items:
        n = len(question.options)
        asks = [Ask(question.render(order, symbols), symbols[:n]) for order in orders(n, "")]
        replies = engine.item([], asks).reply(asks)
        golds = [question.symbol(gold, order, symbols) for order in orders(n, "")]
        right.append([r.text == symbol for r, symbol in zip(replies, golds, strict=True)])
    return np.array(right)


@pytest.mark.parametrize("symbols", ["ABCD", "QWER"])
@pytest.mark.parametrize("name", ENGINES)
def test_first_position_and_perfect(parts, name, symbols):
    """Always the first: right in 1/n of the orders of every item, and never in all."""
    items = questions(3, 2)
    seen = answers(oracle(first_position, parts), name, items, symbols)
    assert seen[:, 0].mean() == 1 / 3 and (seen.mean(1) == 1 / 3).all() and not seen.all(1).any()
    assert answers(oracle(knows(right), parts), name, items, symbols).all()


@pytest.mark.parametrize("name", ENGINES)
def test_letters_only(parts, name):
    vlm = oracle(knows(right, "ABCD"), parts)
    assert answers(vlm, name, questions(3, 1), "ABCD").all()
    assert not answers(vlm, name, questions(3, 1), "QWER").any()


def write_sqa(folder, items: list[tuple[Question, int]]) -> None:
    """ScienceQA's files; every item has a picture."""
    (folder / "images" / "test").mkdir(parents=True)
    Image.new("RGB", (28, 28), "red").save(folder / "images" / "test" / "x.png")
    records = []
    for i, (question, gold) in enumerate(items):
        text = Question(question.stem, question.options).render()
        turns = [("human", f"<image>\n{text}"), ("gpt", "ABCD"[gold])]
        turns = [{"from": role, "value": value} for role, value in turns]
        records.append({"id": str(i), "image": "x.png", "conversations": turns})
    (folder / "llava_test_CQM-A.json").write_text(json.dumps(records))


def run(vlm, folder, items, **settings) -> dict:
    """The readings of a whole run's summary, items that count."""
    if not (folder / "sqa").exists():
        write_sqa(folder / "sqa", items)
    out = folder / f"out {vlm.fingerprint}"
    where = {"benchmark": "sqa", "data": str(folder / "sqa"), "model": "oracle", "out": str(out)}
    evaluation = Evaluation(RunSettings(**where, **settings))
    evaluation.vlm = vlm
    summary = json.loads((evaluation.execute() / "summary.json").read_text())
    return {name: reading["counted"] for name, reading in summary["readings"].items()}


def four(block: dict) -> list[float]:
    return [block[name] for name in ("clean", "pa", "sa", "sa_pa")]


def test_first_position_through_a_run(parts, tmp_path):
    """Right options evenly over the positions of 12 questions with two and 12 with four options."""
    blocks = run(oracle(first_position, parts), tmp_path, questions(2, 6) + questions(4, 3))
    for block in blocks.values():
        assert four(block) == [37.5, 0, 37.5, 0]


def test_perfect_through_a_run(parts, tmp_path):
    blocks = run(oracle(knows(right), parts), tmp_path, questions(2, 3) + questions(4, 2))
    for block in blocks.values():
        assert four(block) == [100] * 4


def test_letters_only_through_a_run(parts, tmp_path):
    """Under other symbols it writes the option's text, which is no symbol."""
    blocks = run(oracle(knows(right, "ABCD"), parts), tmp_path, questions(3, 2))
    for reading in ("exact", "parse"):
        assert four(blocks[reading]) == [100, 100, 0, 0]


def test_random_through_a_run(parts, tmp_path):
    """1/2 and (1/2)^2 of 100 questions with two options, within four standard deviations."""
    blocks = run(oracle(uniform, parts), tmp_path, questions(2, 50))
    for name, p in [("clean", 1 / 2), ("pa", 1 / 4), ("sa", 1 / 2), ("sa_pa", 1 / 4)]:
        assert abs(blocks["exact"][name] / 100 - p) < 4 * (p * (1 - p) / 100) ** 0.5
