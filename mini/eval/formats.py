"""The evaluation sets in the real benchmarks' own files, laid out like playground/data/eval.

Facts these writers reproduce: ScienceQA's text has "Context: " only where there is a hint; SEED's
pictures have no file extension; MMBench's circular copies are rows `index + 1,000,000 * k` whose
options are rotated. The other benchmarks are in evalchoice and evalopen.
"""

from __future__ import annotations

import base64
import csv
import io

from mini.eval.choice import aokvqa, arc, boolq, mmmu
from mini.eval.items import Choice, EvalSets, Open
from mini.eval.open import gqa, mme, pope, textvqa
from mini.jsonfiles import as_json, as_jsonl, json_list
from mini.render import jpeg
from mini.samples import LETTER as LETTER_SUFFIX
from mini.samples import LETTERS, SHORT, multiple_choice

MMBENCH_EVERY = 2  # MMBench has four rows and a picture in the text for each question: half of mcq
MMBENCH_COPY = 1_000_000
_SEED_DATA = "SEED-Bench-image"
_MMBENCH_COLUMNS = (
    "index question hint A B C D answer category image source l2-category comment split".split()
)


def evaluation_files(sets: EvalSets) -> dict[str, bytes]:
    """All files by their name under eval/."""
    files = _scienceqa(sets.mixed) | _seed(sets.mcq) | pope(sets.yesno)
    files |= gqa(sets.open_ended) | textvqa(sets.printed) | mme(sets.claims)
    files |= aokvqa(sets.knowledge) | mmmu(sets.exams) | arc(sets.facts) | boolq(sets.passages)
    chosen = sets.mcq[::MMBENCH_EVERY]
    files["mmbench/mmbench_dev_20230712.tsv"] = _mmbench(chosen, chinese=False)
    files["mmbench_cn/mmbench_dev_cn_20231003.tsv"] = _mmbench(chosen, chinese=True)
    seed_pictures = {item.id: f"seed_bench/{_seed_picture(item)}" for item in sets.mcq}
    files["mcq_en.json"] = json_list(_cqm(item, seed_pictures[item.id]) for item in sets.mcq)
    files["mcq_cn.json"] = json_list(_cqm(item, seed_pictures[item.id], True) for item in sets.mcq)
    for name, items in (("unseen", sets.unseen), ("open_vqa", sets.open_ended)):
        pictures = {item.id: f"{name}/images/{item.id}.png" for item in items}
        files |= {pictures[item.id]: item.picture for item in items}
        record = _cqm if name == "unseen" else _open
        files[f"{name}/{name}.json"] = json_list(record(item, pictures[item.id]) for item in items)
    return files


def _cqm(item: Choice, image: str | None, chinese: bool = False) -> dict:
    """A LLaVA record in ScienceQA's CQM-A wording: context, question, lettered options; letter."""
    question, options = item.zh if chinese else (item.question, item.options)
    text = multiple_choice(question, options, "").rstrip("\n")
    if item.hint:
        text = f"Context: {item.hint}\n{text}"
    record: dict = {"id": item.id}
    if image:
        record["image"] = image
        text = f"<image>\n{text}"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": LETTERS[item.answer]}]
    return record | {"conversations": turns, "category": item.category}


def _open(item: Open, image: str) -> dict:
    text = f"<image>\n{item.question}\n{SHORT}"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": item.answer}]
    return {"id": item.id, "image": image, "conversations": turns, "category": item.category}


def _scienceqa(items: list[Choice]) -> dict[str, bytes]:
    """llava_test_CQM-A.json, problems.json, pid_splits.json and images/test/<id>/image.png."""
    records, problems, files = [], {}, {}
    for item in items:
        record = _cqm(item, f"{item.id}/image.png" if item.picture else None)
        records.append({key: record[key] for key in record if key != "category"})
        problems[item.id] = {
            "question": item.question,
            "choices": list(item.options),
            "answer": item.answer,
            "hint": item.hint,
            "image": "image.png" if item.picture else None,
            "task": "closed choice",
            "grade": "grade3",
            "subject": item.category,
            "topic": item.category,
            "category": item.category,
            "skill": "",
            "lecture": "",
            "solution": "",
            "split": "test",
        }
        if item.picture:
            files[f"scienceqa/images/test/{item.id}/image.png"] = item.picture
    splits = {"train": [], "val": [], "test": list(problems), "trainval": []}
    splits |= {"minitrain": [], "minival": [], "minitest": list(problems)[::10]}
    files["scienceqa/llava_test_CQM-A.json"] = json_list(records)
    files["scienceqa/problems.json"] = as_json(problems)
    files["scienceqa/pid_splits.json"] = as_json(splits)
    return files


def _seed_picture(item: Choice) -> str:
    return f"{_SEED_DATA}/{item.id}"


def _seed(items: list[Choice]) -> dict[str, bytes]:
    """llava-seed-bench.jsonl (what the model is asked) and SEED-Bench.json (the annotations)."""
    types = {name: i + 1 for i, name in enumerate(dict.fromkeys(i.category for i in items))}
    asked, annotated, files = [], [], {}
    for number, item in enumerate(items):
        text = multiple_choice(item.question, item.options, LETTER_SUFFIX)
        asked.append(
            {
                "image": _seed_picture(item),
                "text": text,
                "category": item.category,
                "question_id": number,
            }
        )
        choices = {f"choice_{'abcd'[i]}": option for i, option in enumerate(item.options)}
        annotated.append(
            {
                "answer": LETTERS[item.answer],
                **choices,
                "data_id": item.id,
                "data_type": "image",
                "question": item.question,
                "question_id": str(number),
                "question_type_id": types[item.category],
            }
        )
        files[f"seed_bench/{_seed_picture(item)}"] = item.picture
    files["seed_bench/llava-seed-bench.jsonl"] = as_jsonl(asked)
    files["seed_bench/SEED-Bench.json"] = as_json({"questions": annotated, "question_type": types})
    return files


def _mmbench(items: list[Choice], chinese: bool) -> bytes:
    """The TSV, first all questions, then their circular copies."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, _MMBENCH_COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    for turn in range(max((len(item.options) for item in items), default=0)):
        for number, item in enumerate(items):
            if turn < len(item.options):
                writer.writerow(_mmbench_row(item, number, turn, chinese))
    return buffer.getvalue().encode()


def _mmbench_row(item: Choice, number: int, turn: int, chinese: bool) -> dict:
    question, options = item.zh if chinese else (item.question, item.options)
    n = len(options)
    rotated = [options[(i + turn) % n] for i in range(n)]
    return {
        "index": number + turn * MMBENCH_COPY,
        "question": question,
        "hint": item.hint,
        **dict(zip("ABCD", rotated, strict=False)),
        "answer": LETTERS[(item.answer - turn) % n],
        "category": item.category,
        "image": base64.b64encode(jpeg(item.picture)).decode(),
        "source": "mini",
        "l2-category": "perception",
        "comment": "",
        "split": "dev",
    }
