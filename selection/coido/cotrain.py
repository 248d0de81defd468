"""`TRAINING=selection.coido.cotrain`: the former name of `selection.methods.coido.cotrain`."""

from llava.launch import process
from selection.methods.coido.cotrain import main

if __name__ == "__main__":
    process(main)
