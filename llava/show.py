"""`python -m llava.data show`: what the model will see of each record, to debug a template."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from pathlib import Path

import msgspec
from rich.console import Console
from rich.text import Text

from llava.conversation import IMAGE_TOKEN, Segment, get_template, render
from llava.errors import DataError, UsageError
from llava.images import BadImage, open_image
from llava.records import Record, parse_record, raw_records
from llava.tokens import IGNORE_INDEX, Encoded, load_tokenizer, tokenize


def show(arguments: argparse.Namespace) -> int:
    """Print what the model will see of each record; returns the exit code (0, 65 or 77)."""
    template = get_template(arguments.template)
    tokenizer = load_tokenizer(arguments.tokenizer)
    if arguments.images is not None and not Path(arguments.images).is_dir():
        raise UsageError(f"{arguments.images}: no such image folder")
    if arguments.limit is not None and arguments.limit < 1:
        raise UsageError(f"--limit {arguments.limit}; it must be at least 1")
    worst = 0
    raws = raw_records(arguments.data, key="conversations")
    for row, raw in enumerate(itertools.islice(raws, arguments.limit)):
        # A bad record or picture is a line among the others: the file is read to its end.
        try:
            record = parse_record(raw)
            segments = render(template, record.turns, record.has_image)
            encoded = tokenize(segments, tokenizer, int(record.has_image))
            (_print_json if arguments.json else _print_view)(row, record, segments, encoded)
            if arguments.images is not None and record.image is not None:
                open_image(arguments.images, record.image, extra_roots=arguments.extra_roots)
        except (DataError, BadImage) as error:
            print(f"error: {arguments.data}: row {row}: {error}", file=sys.stderr)
            worst = max(worst, error.exit_code)
    return worst


def _print_json(row: int, record: Record, segments: list[Segment], encoded: Encoded) -> None:
    supervised = (encoded.labels != IGNORE_INDEX).nonzero().flatten()
    line = {
        "row": row,
        "id": record.id,
        "input_ids": encoded.input_ids.tolist(),
        "supervised": supervised.tolist(),
        "text": "".join(segment.text for segment in segments),
    }
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")  # UTF-8 whatever the locale


def _print_view(row: int, record: Record, segments: list[Segment], encoded: Encoded) -> None:
    console = Console(soft_wrap=True, highlight=False)
    n_supervised = int((encoded.labels != IGNORE_INDEX).sum())
    title = f"row {row}  id {record.id!r}  {len(encoded.input_ids)} ids, {n_supervised} supervised"
    if record.image is not None:
        title += f"  image {record.image!r}"
    view = Text(title + "\n", style="bold")
    for segment in segments:
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda m: repr(m[0])[1:-1], segment.text)
        marked = text if console.is_terminal or not segment.supervised else f"⟦{text}⟧"
        view.append(marked, style="not bold green" if segment.supervised else "not bold")
    if record.has_image:
        view.highlight_words([IMAGE_TOKEN], style="black on magenta")
    console.print(view, end="\n\n")


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="python -m llava.data", description=(__doc__ or "").splitlines()[0]
    )
    command = root.add_subparsers(dest="command", required=True).add_parser(
        "show", help="print what the model will see of each record", description=show.__doc__
    )
    command.add_argument("--data", required=True, help="JSON list, or one record a line")
    command.add_argument("--images", help="image folder; bad images are reported when given")
    command.add_argument("--template", default="v1", help="conversation template")
    command.add_argument("--tokenizer", required=True, help="folder with tokenizer.model or .json")
    command.add_argument("--json", action="store_true", help="one JSON object a line")
    command.add_argument("--limit", type=int, help="first N records only")
    command.add_argument(
        "--extra-roots", type=Path, nargs="+", default=(), help="folders that links may lead to"
    )
    return root


def main() -> None:
    sys.exit(show(parser().parse_args()))
