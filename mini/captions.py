"""`python -m mini captions`: the pool's captions, what `scripts/v1_5/pretrain.sh` aligns with.

They are to the small world what the 558K image-caption pairs are to LLaVA.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from llava.errors import UsageError
from llava.files import atomic_write
from llava.flags import Parser


@dataclasses.dataclass(frozen=True)
class CaptionSettings:
    """Where the captions come from."""

    data: str = "playground/mini"
    """folder that `python -m mini build` filled; captions.json is written into it"""


def main(args: Sequence[str]) -> None:
    """Parse, write, and say how many."""
    parser = Parser(prog="python -m mini captions", description=__doc__.splitlines()[0])
    parser.add_class_arguments(CaptionSettings)
    folder = Path(CaptionSettings(**parser.parse_args(list(args)).as_dict()).data)
    n = write_captions(folder / "pool.json", folder / "captions.json")
    print(f"{folder / 'captions.json'}: {n:,} captions")


def write_captions(pool: Path, out: Path) -> int:
    """Copy the pool's caption records, byte for byte and in order, and return their number.

    The pool holds one record a line, as `python -m mini build` writes it.
    """
    if not pool.is_file():
        raise UsageError(f"{pool}: not there; run `python -m mini build` first")
    lines = [line.rstrip(b",") for line in pool.read_bytes().splitlines() if line[:1] == b"{"]
    captions = [line for line in lines if json.loads(line)["meta"]["task"] == "caption"]
    atomic_write(out, b"[\n" + b",\n".join(captions) + b"\n]\n")
    return len(captions)
