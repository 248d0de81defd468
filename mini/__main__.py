"""`python -m mini <verb>`: build the small real world and what goes with it."""

from __future__ import annotations

import sys
from importlib import import_module

from llava.errors import UsageError
from llava.launch import process

VERBS = {  # verb -> (module with a `main(args)`, what it does)
    "build": ("mini.build", "make the pool and the evaluation sets"),
    "warmup": ("mini.warmup", "train the proxy on 5 % of the pool, and measure it"),
    "clip": ("mini.clip", "make the CLIP that CoIDO and the CLIP score read"),
    "captions": ("mini.captions", "write the pool's captions, which the projector is aligned with"),
    "score": ("mini.score", "accuracy of a checkpoint on the small multiple choice"),
    "report": ("mini.report", "what a selection took and left, by the pool's oracle labels"),
    "base": ("mini.make_base.make", "make the base weights that ship with the project (an hour)"),
    "fixture": ("mini.fixture_set", "make mini/fixture/ again (for maintainers)"),
}


def main() -> None:
    """Hand the arguments after the verb to its module, imported only then: they load much."""
    verb, *args = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print("usage: python -m mini VERB [--help | options]\n")
        print("\n".join(f"  {name:<8} {text}" for name, (_, text) in VERBS.items()))
        return
    if verb not in VERBS:
        raise UsageError(f"mini: no verb {verb!r}; there are {', '.join(VERBS)}")
    import_module(VERBS[verb][0]).main(args)


if __name__ == "__main__":
    process(main)
