"""MMBench, English and Chinese: each question once for every rotation of its options.

    mmbench_dev_20230712.tsv       index, question, hint, A, B, C, D, answer, image (base64), ...
    mmbench_dev_cn_20231003.tsv    the same in Chinese

Rows `index`, `index + 1,000,000`, ... are one question with its options rotated. The published
number is strict: a question counts if all its rows are answered with exactly the right letter.

Options end at the first that is "none": empty, "nan" or "none" in any case, or another word that
pandas, with which LLaVA reads the file, takes for a missing value ("NA", "N/A", "null", ...). So
an option that is literally "None" ends them. A right answer behind it is kept in `answers` and
`gold` is None: by LLaVA's rule such a row is asked without it.

The file of the test split has no `answer`; it is read, but only the benchmark's server scores it.
An `image` may also be the index of the row that has the picture, as in VLMEvalKit's release.

Sources: Liu et al., "MMBench: Is Your Multi-modal Model an All-around Player?"; the rules are those
of LLaVA's model_vqa_mmbench.
"""

from __future__ import annotations

import base64
import binascii
import csv
import dataclasses
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from llava.errors import DataError, UsageError
from llava.eval.question import Question
from llava.eval.tasks.base import Id, Item, Task, check_unique, percent
from llava.eval.tasks.files import question_file
from llava.eval.tasks.lettered import LETTER, gold_of

COPY = 1_000_000
"""distance of `index` between a question and its rotations"""
MAX_FIELD = 2**30
"""longest field in characters; the csv module's own limit, 131,072, is less than a picture"""
OPTIONS = "ABCD"
PREDICTION = 6
"""column of the predictions in a submission, from 0"""
_COLUMNS = {"index", "question", *OPTIONS, "image"}
_DROPPED = {"hint", "category", "source", "image", "comment", "l2-category"}
# pandas 2's missing values; exactly these, for "Na" is an option (sodium).
_MISSING = {"", "<NA>", "N/A", "n/a", "NA", "NULL", "null", "-NaN", "-nan"}
_MISSING |= {"#N/A", "#N/A N/A", "#NA", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}


class MmBench(Task):
    """Metrics: `circular` (published; a question counts if all its rows are right), `per_row`."""

    name = "mmbench"
    title = "MMBench-EN"
    place = 30
    attacked = True
    questions: ClassVar[str] = "mmbench_dev_20230712.tsv"
    instruction: ClassVar[str] = LETTER

    def read(self, data: Path) -> list[Item]:
        """Items in the file's order, `index` as id, the category as group, pictures as bytes."""
        path = question_file(data, self.questions)
        rows = list(_rows(path))
        pictures = _pictures(rows, str(path))
        items = [
            self._item(row, picture, f"{path}: row {i}")
            for i, (row, picture) in enumerate(zip(rows, pictures, strict=True))
        ]
        check_unique(items, str(path))
        return items

    def score(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, float]:
        """See the class. A row without an answer is wrong. UsageError for the test split."""
        if not all(item.answers for item in items):
            raise UsageError(
                f"{self.name}: the file has no right answers; give {self.questions}, or send the "
                "predictions to the benchmark's server"
            )
        groups = defaultdict(list)
        for item in items:
            groups[item.id % COPY].append(texts.get(item.id) == item.answers[0])
        return {
            "circular": percent(sum(map(all, groups.values())), len(groups)),
            "per_row": percent(sum(map(sum, groups.values())), len(items)),
        }

    def recorded(self, item: Item) -> str:
        """Without the instruction, as LLaVA's model_vqa_mmbench has it."""
        return dataclasses.replace(item.question, suffix=None).render()

    def submission(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, bytes]:
        """The server's workbook: the file's columns without pictures and hints, and `prediction`
        as the seventh, as LLaVA's convert_mmbench_for_submission has it.
        """
        names = list(items[0].extra["row"])
        names.insert(PREDICTION, "prediction")
        rows = [item.extra["row"] | {"prediction": texts.get(item.id, "")} for item in items]
        cells = [[_cell(name, row[name]) for name in names] for row in rows]
        return {f"{self.name}.xlsx": workbook([names, *cells])}

    def _item(self, row: Mapping[str, str], picture: bytes, where: str) -> Item:
        stem = row["question"]
        if not is_none(row.get("hint", "")):
            stem = f"{row['hint']}\n{stem}"
        question = Question(stem, options_of(row), self.instruction)
        if len(question.options) < 2:
            raise DataError(f"{where}: fewer than two options; correct its A and B")
        letter = row.get("answer")
        return Item(
            id=_index(row, where),
            prompt=question.render(),
            question=question,
            gold=None if letter is None else _gold(row, question, where),
            answers=() if letter is None else (letter,),
            images=(picture,),
            group=row.get("category", ""),
            extra={"row": {key: row[key] for key in row if key not in _DROPPED}},
        )


class MmBenchCn(MmBench):
    """As `mmbench`, in Chinese."""

    name = "mmbench_cn"
    title = "MMBench-CN"
    place = 40
    questions = "mmbench_dev_cn_20231003.tsv"
    instruction = "请直接回答选项字母。"


def is_none(value: str) -> bool:
    """Whether LLaVA takes a field for missing."""
    return value in _MISSING or value.lower() in ("nan", "none")


def _cell(column: str, value: str) -> str | int | None:
    """A field in the workbook: an index is a number, what pandas takes for missing empty."""
    if column == "index":
        return int(value)
    return None if column != "prediction" and value in _MISSING | {"nan", "NaN", "None"} else value


def workbook(rows: Iterable[Sequence[str | int | None]]) -> bytes:
    """An Excel workbook of one sheet. Text is text, also where it begins with "=": no formulas.

    Characters that a workbook cannot hold are left out.
    """
    # Loading openpyxl takes half a second.
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    for row in rows:
        cells = [WriteOnlyCell(sheet) for _ in row]
        for cell, value in zip(cells, row, strict=True):
            if isinstance(value, str):
                cell.value, cell.data_type = ILLEGAL_CHARACTERS_RE.sub("", value), "s"
            else:
                cell.value = value
        sheet.append(cells)
    buffer = io.BytesIO()
    book.save(buffer)
    return buffer.getvalue()


def options_of(row: Mapping[str, str]) -> tuple[str, ...]:
    """The options of a row up to the first that is none."""
    options = [row[letter] for letter in OPTIONS]
    n = next((i for i, option in enumerate(options) if is_none(option)), len(options))
    return tuple(options[:n])


def _gold(row: Mapping[str, str], question: Question, where: str) -> int | None:
    """Number of the right option; None if an option "none" hides it (see above)."""
    letter = row["answer"]
    hidden = letter in OPTIONS[len(question.options) :] and letter != "" and row[letter] != ""
    return None if hidden else gold_of(question, letter, where)


def _rows(path: Path) -> Iterator[dict[str, str]]:
    """The table's rows by column; UsageError if it is another table, DataError for a bad row."""
    limit = csv.field_size_limit(MAX_FIELD)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            _check_columns(reader.fieldnames or (), path)
            for i, row in enumerate(reader):
                if None in row or None in row.values():
                    raise DataError(
                        f"{path}: row {i}: its number of fields is not the header's "
                        f"{len(reader.fieldnames)}; is the download complete?"
                    )
                yield row
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}; is this MMBench's TSV file?") from error
    finally:
        csv.field_size_limit(limit)


def _check_columns(names: Sequence[str], path: Path) -> None:
    missing = sorted(_COLUMNS - set(names))
    if missing:
        raise UsageError(
            f"{path}: no column {', '.join(missing)}; give MMBench's TSV file, tabs between fields"
        )


def _index(row: Mapping[str, str], where: str) -> int:
    try:
        return int(row["index"])
    except ValueError as error:
        raise DataError(f"{where}: index {row['index'][:40]!r} is no number; correct it") from error


def _pictures(rows: Sequence[Mapping[str, str]], where: str) -> list[bytes]:
    """The encoded picture of each row, one object for rows that have the same."""
    texts = {row["index"]: row["image"] for row in rows}
    decoded: dict[str, bytes] = {}
    for i, row in enumerate(rows):
        text = texts.get(row["image"], row["image"])
        if text not in decoded:
            decoded[text] = _decode(text, f"{where}: row {i}")
    return [decoded[texts.get(row["image"], row["image"])] for row in rows]


def _decode(text: str, where: str) -> bytes:
    try:
        picture = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{where}: image is no base64: {error}; download the file again") from error
    if not picture:
        raise DataError(f"{where}: image is empty; download the file again")
    return picture
