"""Trains with each list of flags of a JSON file in turn, in the processes that a launcher made.

`torchrun ... in_turn.py FILE`. Starting a process takes longer than a tiny run: so it is paid once.
A list that begins with "held" only loads the model, and writes to the file named next which part of
its weights each process holds; one that begins with "moved" moves a folder.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from llava import ranks
from llava.train import zero
from llava.train.__main__ import train
from llava.train.arguments import Arguments, parse
from llava.train.stages import load_model


def held(arguments: Arguments) -> list[float]:
    """Part of the weights that each process holds, by rank."""
    zero.start(arguments.training)
    share = whole = 0
    for parameter in load_model(arguments).model.parameters():
        shard = parameter.ds_tensor.numel() if zero.is_shard(parameter) else 0
        share += parameter.numel() + shard
        whole += zero.whole_shape(parameter).numel()
    return ranks.gathered(share / whole)


def main(runs: list[list[str]]) -> None:
    for run in runs:
        if run[0] == "held":
            Path(run[1]).write_text(json.dumps(held(parse(run[2:]))))
        elif run[0] == "moved":
            ranks.from_main(lambda: shutil.move(*run[1:]))  # noqa: B023 (called at once)
        else:
            train(parse(run))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
