"""JSON as the benchmarks' owners write it: whole, a record a line, or lines."""

from __future__ import annotations

import json
from collections.abc import Iterable


def as_json(value: object) -> bytes:
    """An indented JSON file."""
    return json.dumps(value, ensure_ascii=False, indent=1).encode() + b"\n"


def as_jsonl(entries: Iterable[dict]) -> bytes:
    """JSON lines."""
    return "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries).encode()


def json_list(records: Iterable[dict]) -> bytes:
    """A JSON list with one record a line."""
    return (
        "[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n]\n"
    ).encode()
