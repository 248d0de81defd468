"""What every benchmark in the folder has in common."""

from __future__ import annotations

import pytest

from llava.eval.tasks import Item, find_task, task_names

ATTACKED = {"sqa", "seed", "mmbench", "mmbench_cn", "aokvqa", "mmmu", "arc_e", "boolq"}


@pytest.mark.parametrize("name", task_names())
def test_every_benchmark_says_where_its_pictures_are(name):
    task = find_task(name)
    assert task.attacked == (name in ATTACKED)
    assert task.image_folders and not any(f.startswith(("/", "..")) for f in task.image_folders)


def test_scienceqa_and_arc_count_a_part():
    seen, unseen = Item(1, "?", images=("1.png",)), Item(2, "?")
    for name in sorted(ATTACKED - {"arc_e"}):
        assert find_task(name).counted(seen)
        assert find_task(name).counted(unseen) == (name != "sqa")
