import subprocess
import sys
from pathlib import Path

from llava.progress import Progress


def test_lines_where_there_is_no_terminal(capfd):
    with Progress("forward", 5) as bar:
        bar.advance(3, bad=1)
        bar.advance(2)
    assert "forward: 5/5 samples" in (told := capfd.readouterr().err)
    assert "1 unusable" in told and told.count("\n") == 1


def test_lines_come_every_now_and_then(capfd, monkeypatch):
    monkeypatch.setattr("llava.progress.SECONDS", 0)
    with Progress("forward", 4) as bar:
        for _ in range(4):
            bar.advance(1)
    told = capfd.readouterr().err.splitlines()
    assert [line.split()[1] for line in told] == ["1/4", "2/4", "3/4", "4/4", "4/4"]


def test_silent_when_not_shown(capfd):
    with Progress("forward", 1, shown=False) as bar:
        bar.advance(1)
    assert not capfd.readouterr().err


def test_a_bar_in_a_notebook(tmp_path):
    """Which is told by its kernel's package; its stderr is a pipe."""
    (tmp_path / "ipykernel.py").touch()
    work = (
        "import ipykernel\n"
        "from llava.progress import Progress\n"
        "with Progress('forward', 5) as bar: bar.advance(3); bar.advance(2)\n"
    )
    environment = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, env=environment)
    assert b"forward: 100%" in done.stderr and b"min left" not in done.stderr
