"""Trains with each list of flags of a JSON file in turn and notes how it ends, on every process.

`torchrun ... errors_in_turn.py FILE FOLDER` writes FOLDER/RANK.json: exit code and message each.
That one run follows another shows that no process was left waiting in the one before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llava import ranks
from llava.errors import UserError
from llava.train.__main__ import train
from llava.train.arguments import parse


def ending(flags: list[str]) -> tuple[int, str]:
    try:
        train(parse(flags))
    except UserError as error:
        return error.exit_code, str(error)
    return 0, ""


def main(runs: list[list[str]], folder: Path) -> None:
    endings = [ending(flags) for flags in runs]
    (folder / f"{ranks.rank()}.json").write_text(json.dumps(endings))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
