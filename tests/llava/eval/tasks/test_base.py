"""What every benchmark in the folder has in common, on the small world's files of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.errors import UserError
from llava.eval.question import LETTERS
from llava.eval.tasks import Item, Task, find_task, task_names

WORLD = Path(__file__).parents[4] / "mini" / "fixture" / "eval"
ATTACKED = {"sqa", "seed", "mmbench", "mmbench_cn", "aokvqa", "mmmu", "arc_e", "boolq"}
TITLES = "ScienceQA SEED-Bench MMBench-EN MMBench-CN A-OKVQA MMMU ARC-e BoolQ GQA GQA-OOD POPE"
SUBMITTED = {"sqa", "seed", "mmbench", "mmbench_cn", "aokvqa", "mmmu", "gqa", "gqa_ood", "mme"}
ONE_FILE = {"aokvqa": "aokvqa_v1p0_val.json", "boolq": "dev.jsonl", "arc_e": "ARC-Easy-Test.jsonl"}
ONE_FILE |= {"sqa": "llava_test_CQM-A.json", "seed": "llava-seed-bench.jsonl"}
ONE_FILE |= {"mmbench": "mmbench_dev_20230712.tsv", "pope": "llava_pope_test.jsonl"}
ONE_FILE |= {"mmmu": "Art/validation-00000-of-00001.parquet", "mme": "llava_mme.jsonl"}
ONE_FILE |= {"textvqa": "llava_textvqa_val_v051_ocr.jsonl"}
ONE_FILE |= {"gqa": "llava_gqa_testdev_balanced.jsonl"}


def folder(name):
    path = WORLD / find_task(name).folder
    if not path.exists():
        pytest.skip(f"{name}: has no files in mini/fixture/eval")
    return path


def test_tables_have_their_titles_in_the_order_of_ardss():
    tasks = sorted(map(find_task, task_names()), key=lambda task: task.place)
    expected = [*TITLES.split(), "TextVQA", "MME"]
    assert [task.title for task in tasks][: len(expected)] == expected
    assert Task.place > tasks[len(expected) - 1].place  # others follow


@pytest.mark.parametrize("name", task_names())
def test_items_are_whole_and_their_pictures_are_found(name):
    task = find_task(name)
    items = task.read(folder(name))
    assert task.attacked == (name in ATTACKED)
    assert len({item.id for item in items}) == len(items) > 0
    root = next(p for f in task.image_folders if (p := folder(name) / f).is_dir())
    for item in items:
        assert all(isinstance(i, bytes) or (root / i).is_file() for i in item.images)
        if task.attacked:
            assert item.prompt == item.question.render() and item.gold is not None


@pytest.mark.parametrize("name", task_names())
def test_right_answers_are_right_and_submitted(name):
    task = find_task(name)
    items = task.read(folder(name))
    texts = {i.id: i.answers[0] if i.gold is None else LETTERS[i.gold] for i in items}
    numbers = task.score(items, texts)
    assert min(value for key, value in numbers.items() if "yes_ratio" not in key) in (0, 100)
    assert numbers.get("parse_failures", 0) == 0
    empty = task.score(items, {})
    published = next(iter(numbers))
    assert numbers[published] >= 100 and (name == "pope" or empty[published] == 0)
    assert bool(task.submission(items, texts)) == (name in SUBMITTED)


def test_scienceqa_and_arc_count_a_part():
    seen, unseen = Item(1, "?", images=("1.png",)), Item(2, "?")
    for name in sorted(ATTACKED - {"arc_e"}):
        assert find_task(name).counted(seen)
        assert find_task(name).counted(unseen) == (name != "sqa")


@pytest.mark.parametrize("other", sorted(ONE_FILE))
@pytest.mark.parametrize("name", task_names())
def test_the_file_of_another_benchmark_is_one_clear_line(name, other):
    if other == name or {name, other} in ({"mmbench", "mmbench_cn"}, {"gqa", "gqa_ood"}):
        return
    with pytest.raises(UserError) as caught:
        find_task(name).read(folder(other) / ONE_FILE[other])
    assert "\n" not in str(caught.value) and str(WORLD) in str(caught.value)


@pytest.mark.parametrize("name", sorted(ONE_FILE))
def test_a_question_twice_is_told_by_its_id(name, tmp_path):
    """BoolQ has no ids; POPE compares numbers of labels first; the other three: in their tests."""
    if name in ("boolq", "pope", "mmbench", "mmmu", "seed"):
        return
    source = folder(name) / ONE_FILE[name]
    for path in source.parent.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / source.name).unlink()
    text = source.read_text("utf-8")
    rows = json.loads(text) if text.startswith("[") else list(map(json.loads, text.splitlines()))
    rows.append(rows[0])
    (tmp_path / source.name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="is there twice; rename one"):
        find_task(name).read(tmp_path / source.name)
