"""A whole run of CoIDO with a judge: its scores are read, and the key stands nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.judges import KEY, judge_server
from tests.tiny_models import save_clip, save_pool


def test_a_run_reads_the_marks_and_no_file_or_line_holds_the_key(tmp_path):
    clip = save_clip(tmp_path / "clip")
    pool, images = save_pool(tmp_path / "pool", 24)
    with judge_server(lambda text: str(len(text) % 11)) as judge:
        values = {
            "pool": pool,
            "images": images,
            "clip": clip,
            "judge_url": judge.url,
            "judge_model": "m",
            "judge_cache": tmp_path / "judge.sqlite",
            "store": tmp_path / "store",
            "out": tmp_path / "run",
            "n_clusters": 3,
            "n_neighbours": 4,
            "budget": 12,
            "prepare": True,
        }
        flags = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
        done = subprocess.run(
            [sys.executable, "-m", "selection", "select", "coido", *flags],
            env={**os.environ, "OPENAI_API_KEY": KEY},
            capture_output=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr.decode()
    assert judge.keys == {f"Bearer {KEY}"}
    training = json.loads((tmp_path / "run/artefacts/training.json").read_text())
    assert training["assembly"]["scores"] == ["clip_score", "llm_score"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"manifest.json", "judge.sqlite", "config.yaml"} <= {path.name for path in files}
    for text in (done.stdout, done.stderr, *(path.read_bytes() for path in files)):
        assert KEY.encode() not in text
