"""`python -m llava.model`: what a checkpoint is, and how to make another of it."""

from __future__ import annotations

import argparse
import sys

import torch

from llava.launch import process
from llava.model.convert import TARGETS, convert, merge
from llava.model.inspection import as_json, as_text, examine

EXAMPLES = """\
examples:
  python -m llava.model inspect checkpoints/llava-v1.5-7b-lora --model-base lmsys/vicuna-7b-v1.5
  python -m llava.model merge checkpoints/llava-v1.5-7b-lora --model-base lmsys/vicuna-7b-v1.5 \\
      --out checkpoints/llava-v1.5-7b-merged
  python -m llava.model convert liuhaotian/llava-v1.5-7b --to hf --out checkpoints/llava-hf

PATH and --model-base are directories, or hub names (downloaded, or from the
cache). docs/MODEL_ZOO.md lists published checkpoints.
Exit codes: 0 done or loadable, 2 something is missing or does not fit, 74 damaged file or full
disk, 77 refused because the checkpoint would run code.
"""
TARGET_HELP = """\
hf: Hugging Face's LLaVA; original: LLaVA's full checkpoint; projector: mm_projector.bin with
config.json; hf-lora: a LoRA for PEFT on Hugging Face's LLaVA; lora: a LoRA in LLaVA's layout"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(
        prog="python -m llava.model",
        description="Say what a checkpoint is, and make another of it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = root.add_subparsers(dest="verb", required=True, metavar="{inspect,convert,merge}")
    look = _verb(verbs, "inspect", "say what a checkpoint is, what it lacks and the remedy")
    look.add_argument("--json", action="store_true", help="print one JSON object")
    change = _verb(verbs, "convert", "write a checkpoint in another layout")
    change.add_argument("--to", required=True, choices=TARGETS, help=TARGET_HELP)
    change.add_argument(
        "--vision-tower",
        help="name of the tower for LLaVA's config.json, where the checkpoint does not say it: a "
        "directory or hub name (default: CLIP-L/336 if the tower has its shape)",
    )
    join = _verb(verbs, "merge", "put a LoRA or a projector into its base: a Hugging Face LLaVA")
    for verb in (change, join):
        verb.add_argument("--out", required=True, help="new folder; an existing one must be empty")
        verb.add_argument(
            "--dtype",
            choices=("float32", "bfloat16", "float16"),
            help="type of the weights written (default: as they are)",
        )
    return root


def _verb(verbs: argparse._SubParsersAction, name: str, about: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=about, description=about)
    verb.add_argument("path", metavar="PATH", help="checkpoint: a directory or a hub name")
    verb.add_argument(
        "--model-base",
        required=name == "merge",
        help="model that a LoRA or a projector was trained on: a directory or a hub name",
    )
    return verb


def main(argv: list[str] | None = None) -> None:
    """Run one verb; UserError is left to `process`."""
    arguments = parser().parse_args(argv)
    if arguments.verb == "inspect":
        report = examine(arguments.path, arguments.model_base)
        print(as_json(report) if arguments.json else as_text(report))
        sys.exit(report.exit_code)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    base, out = arguments.model_base, arguments.out
    if arguments.verb == "merge":
        merge(arguments.path, base, out, dtype)
    else:
        options = {"base": base, "dtype": dtype, "vision_tower": arguments.vision_tower}
        convert(arguments.path, arguments.to, out, **options)
    print(f"wrote {out}")


if __name__ == "__main__":
    process(main)
