"""`deepspeed llava/train/train_xformers.py`: memory-efficient attention on any GPU.

LLaVA took it from the package xformers for GPUs without flash attention, such as V100; PyTorch has
it built in.
"""

import sys
from pathlib import Path

# A file that is run finds the modules beside it, not the package it belongs to.
sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402

from llava.launch import process  # noqa: E402
from llava.train.__main__ import main  # noqa: E402


def memory_efficient() -> None:
    """Train with that kernel of PyTorch's attention; off a GPU there is only one."""
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    main(attention="sdpa")


if __name__ == "__main__":
    process(memory_efficient)
