"""The file that LLaVA's scripts launch: flash attention where its package and a GPU are.

Without them PyTorch's own attention is used, which keeps no attention matrix either.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

# A file that is run finds the modules beside it, not the package it belongs to.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

from llava import ranks  # noqa: E402
from llava.launch import process  # noqa: E402
from llava.train.__main__ import main  # noqa: E402


def lean_attention() -> str:
    """What `--attn_implementation` is here when it is not given; says so if it is not flash."""
    if find_spec("flash_attn") and torch.cuda.is_available():
        return "flash_attention_2"
    if ranks.is_first_here():
        missing = "a GPU" if find_spec("flash_attn") else "the package flash_attn"
        print(f"no flash attention without {missing}: PyTorch's own is used", file=sys.stderr)
    return "sdpa"


if __name__ == "__main__":
    process(lambda: main(attention=lean_attention()))
