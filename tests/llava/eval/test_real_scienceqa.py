"""Real ScienceQA items (the validation split in LLaVA's wording): read, attacked and scored."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest

from llava.eval.__main__ import main
from llava.eval.question import SYMBOLS, orders
from llava.eval.tasks import find_task

SUFFIX = "Answer with the option's letter from the given choices directly."
TEST_IMAGES = {2: 677, 3: 532, 4: 770, 5: 38}  # of the test split, as the reference states


@pytest.fixture(scope="module")
def path(shared_data):
    return shared_data / "llava_val_CQM-A.json"


@pytest.fixture(scope="module")
def items(path):
    return find_task("sqa").read(path)


def of_text(prompt, symbols):
    """Stem and options of a prompt, found from its end: another way than the code's."""
    rest, suffix = prompt.rsplit("\n", 1)
    assert suffix == SUFFIX
    options = []
    for symbol in reversed(symbols):
        rest, option = rest.rsplit(f"\n{symbol}. ", 1)
        options.insert(0, option)
    return rest, options


def test_counts(items):
    """The orders of the items with a picture; those of the test split add up to the published."""
    sizes = Counter(len(item.question.options) for item in items if item.images)
    assert sizes == {2: 712, 3: 588, 4: 753, 5: 44}
    assert sizes.total() == 2097 == sum(map(find_task("sqa").counted, items))
    asked = sum(len(orders(len(i.question.options), f"sqa|{i.id}")) for i in items if i.images)
    assert asked == 28_304 == sum(n * math.factorial(size) for size, n in sizes.items())
    test_split = {size: len(orders(size, "")) for size in TEST_IMAGES}
    assert sum(n * test_split[size] for size, n in TEST_IMAGES.items()) == 27_586


def test_every_attacked_prompt_is_whole(items, path):
    """All orders, under letters and both other symbols, against the file's own text."""
    records = {record["id"]: record for record in json.loads(path.read_text())}
    for item in items:
        asked, answer = (turn["value"] for turn in records[item.id]["conversations"])
        asked = asked.removeprefix("<image>\n") + "\n" + SUFFIX
        n = len(item.question.options)
        stem, texts = of_text(asked, "ABCDE"[:n])
        right = texts["ABCDE".index(answer)]
        for name, order in ((s, o) for s in SYMBOLS for o in orders(n, f"sqa|{item.id}")):
            symbols = SYMBOLS[name]
            prompt = item.question.render(order, symbols)
            shown, options = of_text(prompt, symbols[:n])
            assert shown == stem and options == [texts[k] for k in order]
            gold = item.question.symbol(item.gold, order, symbols)
            assert options[symbols.index(gold)] == right
        assert item.question.render() == item.prompt == asked


@pytest.mark.parametrize("form", ["{}", "{}. it is", "The answer is {}."])
def test_an_answer_file_is_scored(items, path, tmp_path, capsys, form):
    """Right on all pictures, wrong on all texts: the share of pictures in total, 100 in image."""
    answers = tmp_path / "answers.jsonl"
    with answers.open("w") as file:
        for item in items:
            letter = "ABCDE"[item.gold if item.images else item.gold - 1]
            row = {"question_id": item.id, "prompt": item.prompt, "text": form.format(letter)}
            file.write(json.dumps(row) + "\n")
    words = ["score", "--benchmark", "sqa", "--data", str(path), "--answers", str(answers)]
    main([*words, "--json", "--submission", str(tmp_path / "out")])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["image"] == 100 and numbers["parse_failures"] == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["count"] == 4241 and result["acc"] == numbers["total"]
    output = json.loads((tmp_path / "out" / "output.jsonl").read_text())
    assert len(output["correct"]) == 2097
    assert numbers["total"] == pytest.approx(100 * 2097 / 4241)
    assert all(row["is_multimodal"] == ("<image>" in row["question"]) for row in output["correct"])
