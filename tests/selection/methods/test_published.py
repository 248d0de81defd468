"""Every method has the published numbers as its defaults, and a page that can be followed."""

import dataclasses
import re
from pathlib import Path

import pytest

from selection.methods import find_methods
from selection.signals.gradients.gradients import Gradients

ROOT = Path(__file__).parents[3]
SOURCE = "\n".join(path.read_text() for path in sorted((ROOT / "selection").rglob("*.py")))
COINCIDE = {"n_clusters": 10_000, "n_iter": 50}  # and of what its authors ran on LLaVA-665K
PUBLISHED = {
    "coincide": {**COINCIDE, "n_layers": 5, "temperature": 0.1},
    "d2_pruning": {"n_neighbours": 5, "gamma_forward": 1.0, "gamma_reverse": 0.4},
    "el2n": {"keep": "middle"},
    "icons": {"aggregation": "vote", "subtasks": "mean", "visual_dependency": False, "dim": 5120},
    "length": {"keep": "high"},
    "less": {"gradient": "adam", "dim": 8192},
    "perplexity": {"keep": "middle"},
    "rds": {"aggregation": "vote", "subtasks": "mean"},
    "self_filter": {"n_penalised": 10, "gamma": 1.0, "net_epochs": 3, "net_batch": 128}
    | {"net_lr": 2e-5, "difficulty": "net"},
    "self_sup": {"keep": "easy"},
    "semdedup": {**COINCIDE, "keep": "hard"},
    "tive": {"dim": 8192},
}
PRESETS = {
    "d2_pruning": {"normalize": False},
    "icons": {"subtasks": "max"},
    "tive": {"q": 0.001},
}
each_method = pytest.mark.parametrize("name", find_methods())


@pytest.mark.parametrize("name", PUBLISHED)
def test_defaults_are_the_published_numbers(name):
    settings = dataclasses.asdict(find_methods()[name].Settings())
    assert {key: settings[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", PRESETS)
def test_as_released_is_what_the_released_code_does(name):
    assert find_methods()[name].presets == {"as_released": PRESETS[name]}


def test_targets_of_less_are_plain_gradients_and_its_pool_adams_steps():
    method = find_methods()["less"]()
    assert method.signals() == {"gradients_1": Gradients(dim=8192, kind="adam")}
    assert method.target_signals() == {"gradients_1": Gradients(dim=8192)}


@each_method
def test_its_page_names_the_command_every_flag_and_preset_and_what_differs(name):
    method, page = find_methods()[name], page_of(name)
    assert re.search(rf"(selection\.sh|selection select) {name}\b", page)
    assert re.search("differs from", page, re.IGNORECASE)
    flags = [f"--{name}" for name in vars(method.Settings).get("__annotations__", ())]
    presets = [f"--preset {preset}" for preset in method.presets]
    assert [word for word in flags + presets if word not in page and word[2:] not in page] == []


@each_method
def test_the_code_that_its_page_names_is_there(name):
    """The last column of a table of equations, and files in the text."""
    page, missing = page_of(name), []
    for path in re.findall(r"`((?:selection|scripts|llava|mini)/[\w/]+\.\w+)`", page):
        missing += [] if (ROOT / path).is_file() else [path]
    for table in re.findall(r"\|[^\n|]+\|[^\n|]*\| code \|\n((?:\|.*\n)+)", page):
        for row in table.splitlines()[1:]:
            for word in re.findall(r"`([A-Za-z_][\w.]*)`", row.rstrip("|").rpartition(" | ")[2]):
                known = rf'\b(?:def|class) {word.rpartition(".")[2]}\b|"{word}"'
                is_there = word.endswith((".py", ".sh")) or re.search(known, SOURCE)
                missing += [] if is_there else [word]
    assert missing == []


def page_of(name: str) -> str:
    return (ROOT / "docs/methods" / f"{name}.md").read_text()
