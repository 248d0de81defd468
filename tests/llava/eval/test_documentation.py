"""docs/Evaluation.md: its example is a benchmark, and it names every one there is."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import llava.eval.tasks
from llava.eval.tasks import find_task, task_names

PAGE = (Path(__file__).parents[3] / "docs" / "Evaluation.md").read_text(encoding="utf-8")


def test_the_example_is_found_read_and_scored(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "signs.py").write_text(code)
    monkeypatch.setattr(llava.eval.tasks, "__path__", [*llava.eval.tasks.__path__, str(tmp_path)])
    row = {"id": "1", "question": "?", "choices": ["a", "b"], "answer": "B", "picture": "x.png"}
    (tmp_path / "signs.jsonl").write_text(json.dumps(row))
    task = find_task("signs")
    sys.modules.pop("llava.eval.tasks.signs")
    (item,) = task.read(tmp_path)
    assert item.prompt.startswith("?\nA. a\nB. b\nAnswer with") and item.images == ("x.png",)
    assert task.score([item], {"1": "B"}) == {"accuracy": 100.0, "parse_failures": 0.0}


def test_every_benchmark_is_named():
    assert all(f"| `{name}` |" in PAGE for name in task_names())


@pytest.mark.parametrize("name", task_names())
def test_every_benchmark_has_its_folder(name):
    (entry,) = re.findall(rf"^\| `{name}` \| [^`]* \| `(\w+)` \|", PAGE, re.MULTILINE)
    assert entry == find_task(name).folder
