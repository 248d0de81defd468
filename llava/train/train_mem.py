"""The file that LLaVA's scripts launch; the same as `python -m llava.train`.

It once chose flash attention. PyTorch's own attention, used now, is as lean and needs no package.
"""

from llava.errors import run_main
from llava.train.__main__ import main

if __name__ == "__main__":
    run_main(main)
