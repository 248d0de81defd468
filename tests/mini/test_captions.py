"""The captions of a pool, against what reading it as JSON gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.errors import UsageError
from mini.captions import main

FIXTURE = Path(__file__).parents[2] / "mini" / "fixture"


def test_captions_are_the_pools_records_unchanged(tmp_path, capsys):
    pool = (FIXTURE / "pool.json").read_text(encoding="utf-8")
    (tmp_path / "pool.json").write_text(pool, encoding="utf-8")
    main(["--data", str(tmp_path)])
    expected = [r for r in json.loads(pool) if r["meta"]["task"] == "caption"]
    written = (tmp_path / "captions.json").read_text(encoding="utf-8")
    assert json.loads(written) == expected and len(expected) == 12
    assert all(line.rstrip(",") in pool for line in written.splitlines())
    assert all(
        len(r["conversations"]) == 2 and "image" in r for r in expected
    )  # what `plain` needs
    assert "12 captions" in capsys.readouterr().out


def test_without_a_pool(tmp_path):
    with pytest.raises(UsageError, match="python -m mini build"):
        main(["--data", str(tmp_path)])
