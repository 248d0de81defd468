"""`deepspeed llava/train/train.py` or `torchrun`: trains with PyTorch's own attention."""

import sys
from pathlib import Path

# A file that is run finds the modules beside it, not the package it belongs to.
sys.path[0] = str(Path(__file__).resolve().parents[2])

from llava.launch import process  # noqa: E402
from llava.train.__main__ import main  # noqa: E402

if __name__ == "__main__":
    process(lambda: main(attention="sdpa"))
