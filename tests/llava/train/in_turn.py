"""Trains with each list of flags of a JSON file in turn, in the processes that a launcher made.

`torchrun ... in_turn.py FILE`. Starting a process takes longer than a tiny run: so it is paid once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llava.train.__main__ import train
from llava.train.arguments import parse

if __name__ == "__main__":
    for flags in json.loads(Path(sys.argv[1]).read_text()):
        train(parse(flags))
