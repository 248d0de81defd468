"""`python -m llava.train.launch`: the former name of `python -m llava.launch`."""

import sys

from llava.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
