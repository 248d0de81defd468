"""Files of the multiple choice that LLaVA has no scripts for: A-OKVQA, MMMU, ARC-Easy, BoolQ.

Facts these writers reproduce: A-OKVQA's pictures are COCO's, named by twelve digits; MMMU is a
parquet file a subject, its options a list as Python writes it, its pictures in seven columns; some
of ARC's questions have numbers for letters; BoolQ's have neither ids nor question marks.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter

import pyarrow as pa
import pyarrow.parquet as pq

from mini.eval.items import Choice, Exam, Passage
from mini.jsonfiles import as_jsonl, json_list
from mini.render import jpeg
from mini.samples import LETTERS

ARC_NUMBERED = 20  # every so many questions of ARC-Easy has numbers for labels
_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_N_PICTURES = 7


def aokvqa(items: Iterable[Choice]) -> dict[str, bytes]:
    """aokvqa_v1p0_val.json and val2017/<image_id>.jpg."""
    rows, files = [], {}
    for number, item in enumerate(items, start=1):
        files[f"aokvqa/val2017/{number:012}.jpg"] = jpeg(item.picture)
        rows.append(
            {
                "split": "val",
                "image_id": number,
                "question_id": f"mini{number:018}",
                "question": item.question,
                "choices": list(item.options),
                "correct_choice_idx": item.answer,
                "direct_answers": [item.options[item.answer]] * 10,
                "difficult_direct_answer": False,
                "rationales": [],
            }
        )
    return files | {"aokvqa/aokvqa_v1p0_val.json": json_list(rows)}


def mmmu(exams: Iterable[Exam]) -> dict[str, bytes]:
    """<Subject>/validation-00000-of-00001.parquet."""
    by_subject = groupby(sorted(exams, key=attrgetter("subject")), attrgetter("subject"))
    return {
        f"mmmu/{subject}/validation-00000-of-00001.parquet": _mmmu_subject(list(group))
        for subject, group in by_subject
    }


def arc(items: Iterable[Choice]) -> dict[str, bytes]:
    """ARC-Easy-Test.jsonl."""
    rows = []
    for number, item in enumerate(items, start=1):
        labels = "1234" if number % ARC_NUMBERED == 0 else LETTERS
        choices = [
            {"text": text, "label": label}
            for text, label in zip(item.options, labels, strict=False)
        ]
        rows.append(
            {
                "id": f"Mini_{number}",
                "question": {"stem": item.question, "choices": choices},
                "answerKey": labels[item.answer],
            }
        )
    return {"arc_e/ARC-Easy-Test.jsonl": as_jsonl(rows)}


def boolq(passages: Iterable[Passage]) -> dict[str, bytes]:
    """dev.jsonl."""
    rows = (
        {
            "question": item.question,
            "title": item.passage.split()[0],
            "answer": item.answer,
            "passage": item.passage,
        }
        for item in passages
    )
    return {"boolq/dev.jsonl": as_jsonl(rows)}


def _mmmu_subject(exams: list[Exam]) -> bytes:
    rows = [_mmmu_row(number, exam) for number, exam in enumerate(exams, start=1)]
    table = pa.Table.from_pylist(rows)
    for number in range(1, _N_PICTURES + 1):
        cells = [_cell(exam, number) for exam in exams]
        table = table.append_column(f"image_{number}", pa.array(cells, _IMAGE))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _mmmu_row(number: int, exam: Exam) -> dict:
    return {
        "id": f"validation_{exam.subject}_{number}",
        "question": exam.question,
        "options": str(list(exam.options)),
        "explanation": "",
        "img_type": "['Icons and Symbols']",
        "answer": exam.answer,
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice" if exam.options else "open",
        "subfield": exam.subject,
    }


def _cell(exam: Exam, number: int) -> dict | None:
    if number > len(exam.pictures):
        return None
    return {"bytes": exam.pictures[number - 1], "path": f"{exam.subject}_{number}.png"}
