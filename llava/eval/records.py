"""What an evaluation writes down: its part files while it runs, then answers and attacks.

    parts/<rank>.jsonl    one line a finished unit, appended by one process
    attacks.jsonl         a head, then one line for every prompt and its answer: from it alone every
                          number under attack can be computed again
    answers.jsonl         LLaVA's format: what was answered to the questions as they were given

A unit counts when its line is whole: a line that a crash cut short is dropped and its unit asked
again. Two processes may finish the same unit; one of the lines is used, and they are equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import xxhash

from llava import files
from llava.errors import DataError, UsageError
from llava.eval.tasks.base import Id

ATTACKS = "attacks.jsonl"
ANSWERS = "answers.jsonl"


class Head(msgspec.Struct):
    """First line of an attack file: what a whole one holds."""

    benchmark: str
    model: str
    n_items: Annotated[int, msgspec.Meta(ge=1)]
    letters: str
    """symbols of Clean and PA, one a position"""
    symbols: str
    """symbols of SA and SA+PA; empty if they were not asked"""
    all_orders: bool
    """whether options were put in other orders than the given one"""
    until_failure: bool
    """whether an item was asked no more after every reading had been wrong once"""


class Record(msgspec.Struct, gc=False):
    """One prompt and its answer. Open questions have no symbols, order, options, gold, logits."""

    question_id: Id
    row: int
    """of the item in the benchmark"""
    group: str
    counted: bool
    """whether the item is in the numbers that papers print"""
    symbols: str
    """those offered, one a position"""
    order: list[int]
    """number of the option at each position"""
    prompt: str
    options: dict[str, int]
    """number of the option under each symbol"""
    gold: list[str]
    """the right symbols: several for options of equal text, none if no option is right"""
    text: str
    logits: list[float]
    """of the symbols' first tokens where the answer begins"""
    same: int | None
    """row of the item as which this was really asked; None: as itself"""

    @property
    def is_given(self) -> bool:
        """Whether the options stand in their given order."""
        return self.order == list(range(len(self.order)))


class Unit(msgspec.Struct):
    """One line of a part file."""

    unit: int
    seconds: float
    n_tokens: int
    """positions that the language model processed"""
    records: list[Record]


class _Line(msgspec.Struct):
    unit: int
    records: list[msgspec.Raw]


_LINE = msgspec.json.Decoder(_Line)
_UNIT = msgspec.json.Decoder(Unit)
_RECORD = msgspec.json.Decoder(Record)


class Parts:
    """The finished units of a run, of all its processes."""

    def __init__(self, folder: Path, rank: int) -> None:
        files.make_folder(folder)
        self._folder, self._appended = folder, folder / f"{rank}.jsonl"
        self._read: dict[Path, int] = {}  # bytes of each file that are known
        self._places: dict[int, tuple[Path, int, int]] = {}  # unit: file, offset, length

    def add(self, units: Iterable[Unit]) -> None:
        """Keep some units; they are on the disk when this returns."""
        files.append_line(self._appended, b"\n".join(map(msgspec.json.encode, units)))

    def refresh(self) -> set[int]:
        """The units that are finished by now."""
        for path in sorted(self._folder.glob("*.jsonl")):
            self._read[path] = self._scan(path, self._read.get(path, 0))
        return set(self._places)

    def __getitem__(self, unit: int) -> Unit:
        path, offset, length = self._places[unit]
        with path.open("rb") as file:
            file.seek(offset)
            return _UNIT.decode(file.read(length))

    def _scan(self, path: Path, offset: int) -> int:
        """Note the whole lines of `path` from `offset`; returns where the next one will begin."""
        with path.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # being written, or cut short
                try:
                    self._places.setdefault(_LINE.decode(line).unit, (path, offset, len(line)))
                except msgspec.MsgspecError:
                    pass  # empty, or cut short by a crash: the unit is asked again
                offset += len(line)
        return offset


def write_attacks(path: Path, head: Head, parts: Parts, n_units: int) -> None:
    """Put all units' records together, unit by unit."""

    def lines() -> Iterator[bytes]:
        yield msgspec.json.encode(head) + b"\n"
        for unit in range(n_units):
            yield b"".join(msgspec.json.encode(r) + b"\n" for r in parts[unit].records)

    files.atomic_write(path, lines())


def write_answers(path: Path, given: Iterable[tuple[Record, str]], model: str) -> None:
    """The record of each item, and its recorded prompt, as LLaVA's evaluation modules write it."""

    def lines() -> Iterator[bytes]:
        for record, prompt in given:
            name = f"{model}|{record.question_id}|{prompt}"
            answer = {
                "question_id": record.question_id,
                "prompt": prompt,
                "text": record.text,
                "answer_id": xxhash.xxh3_64_hexdigest(name.encode()),
                "model_id": model,
                "metadata": {},
            }
            yield msgspec.json.encode(answer) + b"\n"

    files.atomic_write(path, lines())


def write_submission(folder: Path, content: Mapping[str, bytes]) -> None:
    """A benchmark's files in its owners' formats, by name; no folder if there are none."""
    for name, data in content.items():
        files.make_folder((folder / name).parent)
        files.atomic_write(folder / name, data)


def read_attacks(path: Path) -> tuple[Head, Iterator[Record]]:
    """Head and records of an attack file, streamed.

    Raises UsageError if it cannot be read, DataError naming the line of the first bad one.
    """
    lines = _lines(path)
    try:
        head = msgspec.json.decode(next(lines, b""), type=Head)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: line 1: {error}; an attack file begins with what `run` asked: give the "
            f"{ATTACKS} of a finished run"
        ) from error
    return head, (_record(line, f"{path}: line {i}") for i, line in enumerate(lines, 2))


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give a finished run or its file") from error


def _record(line: bytes, where: str) -> Record:
    try:
        return _RECORD.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: {error}; the file is damaged: run again to write it") from error
