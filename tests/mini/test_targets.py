"""Target tasks of the small world: apart from pool and evaluation, balanced, readable as such."""

import dataclasses
import json
from collections import Counter

import pytest
from PIL import Image

from llava.errors import DataError
from mini.eval.items import Choice, EvalSets
from mini.eval.sets import make_evalsets
from mini.render import SIZE, png
from mini.targets import target_files
from mini.world import target_emoji
from selection.pool.targets import read_targets

NO_SETS = EvalSets([], [], [], [], [])
OBJECTS = ("object_mcq", "object_yesno", "object_open", "object_cn")


@pytest.fixture(scope="module")
def world(small_world):
    """The invented world with 3D drawings of its training concepts."""
    shades = iter(range(200))
    more = {
        (emoji.hexcode, "3d"): png(Image.new("RGB", (SIZE, SIZE), (next(shades), 255, 1)))
        for emoji in target_emoji(small_world.concepts)
    }
    return dataclasses.replace(small_world, emoji=small_world.emoji | more)


def records(files, name):
    return json.loads(files[f"{name}.json"])


def turns(record):
    return [turn["value"] for turn in record["conversations"]]


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return read_targets(folder / "targets.yaml")


def test_the_files_are_target_tasks(world, tmp_path):
    targets = write(tmp_path, target_files(world, NO_SETS, {}))
    by_name = {target.name: target for target in targets}
    assert set(by_name) == {"object_mcq", "word_mcq"}  # 60 drawings fill one quarter
    assert [s.name for s in by_name["object_mcq"].subtasks] == ["fine", "coarse"]
    for target in targets:
        for subtask in target.subtasks:
            for row in subtask.rows:
                image = subtask.pool.record(row).image
                assert image is None or (tmp_path / target.images / image).is_file()


def test_the_same_world_gives_the_same_bytes(world):
    assert target_files(world, NO_SETS, {}) == target_files(world, NO_SETS, {})


def test_pictures_of_pool_or_evaluation_are_refused(world):
    files = target_files(world, NO_SETS, {})
    name = next(name for name in files if name.startswith("images/"))
    with pytest.raises(DataError, match="images/3d/.*: also in the pool"):
        target_files(world, NO_SETS, {"somewhere.png": files[name]})


def test_words_are_none_that_evaluation_asks_about(small_world):
    def questions(sets):
        found = records(target_files(small_world, sets, {}), "word_mcq")
        return {turns(record)[0].split("\n")[0] for record in found}

    free = questions(NO_SETS)
    asked = [Choice("", "", question, (), 0) for question in sorted(free)[::2]]
    for name in ("mixed", "facts"):
        sets = dataclasses.replace(NO_SETS, **{name: asked})
        assert questions(sets) and not questions(sets) & {item.question for item in asked}


def test_figures_need_no_more_than_pypi(pypi_world, tmp_path):
    targets = write(tmp_path, target_files(pypi_world, make_evalsets(pypi_world), {}))
    assert [target.name for target in targets] == ["shape_open", "count_open", "number_ocr"]
    assert all(len(target.subtasks[0].rows) == 80 for target in targets)
    counts = Counter(turns(r)[1] for r in json.loads((tmp_path / "count_open.json").read_text()))
    assert counts == {str(n): 16 for n in range(2, 7)}


def test_the_full_world_has_every_task_balanced_and_no_drawing_twice(full_world):
    files = target_files(full_world, make_evalsets(full_world), {})
    shown = Counter()
    for name in OBJECTS:
        found = records(files, name)
        assert len(found) == 80
        shown.update(record["image"] for record in found)
    assert set(shown.values()) == {1} and len(shown) == 320
    for name in ("object_mcq", "object_cn", "word_mcq"):
        answers = Counter(turns(record)[1] for record in records(files, name))
        assert answers == dict.fromkeys("ABCD", 20)
    assert Counter(turns(r)[1] for r in records(files, "object_yesno")) == {"Yes": 40, "No": 40}
