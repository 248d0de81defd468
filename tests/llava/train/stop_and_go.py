"""One run without a stop to ROOT/whole, then one for each STEP that goes on from its checkpoint.

`torchrun ... stop_and_go.py ROOT STEP,STEP FLAGS`; those write to ROOT/from-STEP.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from llava import ranks
from llava.train.__main__ import train
from llava.train.arguments import parse


def main(root: Path, steps: list[str], flags: list[str]) -> None:
    train(parse([*flags, "--output_dir", str(root / "whole")]))
    for step in steps:
        output, name = root / f"from-{step}", f"checkpoint-{step}"
        if ranks.rank() == 0:
            shutil.copytree(root / "whole" / name, output / name)
        ranks.barrier()
        train(parse([*flags, "--output_dir", str(output)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
