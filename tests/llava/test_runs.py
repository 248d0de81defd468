"""Folders are claimed by one run, also when its processes come at the same time."""

from __future__ import annotations

import pytest

from llava.errors import UsageError
from llava.runs import claim_folder


def test_what_another_process_is_writing_does_not_make_a_folder_taken(tmp_path):
    """It has begun its `run.json` under a temporary name."""
    (tmp_path / "run.json.0123456789abcdef.tmp").write_text("{")
    assert claim_folder((tmp_path, False), {"seed": 1}) == (tmp_path, False)
    assert claim_folder((tmp_path, False), {"seed": 1}) == (tmp_path, False)
    with pytest.raises(UsageError, match="seed: 1 -> 2"):
        claim_folder((tmp_path, False), {"seed": 2})


def test_a_folder_of_other_things_is_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no run"):
        claim_folder((tmp_path, False), {"seed": 1})
    assert claim_folder((tmp_path, True), {"seed": 1})[0].name == f"{tmp_path.name}-2"


def test_a_run_is_known_again_whatever_its_settings_are_made_of(tmp_path):
    """Tuples come back from JSON as lists."""
    settings = {"prices": (0.0, 0.5), "seed": 1, "name": None}
    (tmp_path / "out").mkdir()
    for _ in range(2):
        assert claim_folder((tmp_path / "out", False), settings) == (tmp_path / "out", False)
