"""How a program ends: in one line, with an exit code that says why."""

import subprocess
import sys

import pytest

from llava import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [("UsageError", 2), ("DataError", 65), ("NonFiniteError", 70), ("StorageError", 74)]
    + [("RefusedError", 77)],
)
def test_a_user_error_is_one_line_and_its_code(error, code, capsys):
    def main():
        raise getattr(errors, error)("what it was")

    with pytest.raises(SystemExit) as ended:
        errors.run_main(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == "error: what it was\n"


def test_a_reader_that_goes_away_ends_a_program_quietly():
    """`selection list | head`, with a reader that is gone before the first line."""
    command = [sys.executable, "-m", "selection", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        started.stdout.close()
        assert started.stderr.read() == b""
    assert started.returncode == 141
