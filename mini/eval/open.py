"""Files of the questions with short answers: POPE, GQA, GQA-OOD, TextVQA, MME.

Facts these writers reproduce: POPE's question and label files are matched by order within a
category; GQA-OOD parts the questions of a group by how often their answer occurs in it; TextVQA's
question ids are its pictures', ten answers each; MME's text files hold two questions a picture.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from mini.concepts import rank
from mini.eval.items import Claim, Open, Probe
from mini.jsonfiles import as_json, as_jsonl
from mini.recipes.figures import COLOURS, SHAPES
from mini.render import jpeg
from mini.samples import SHORT, article

GQA_EVERY = 2  # GQA asks half of the open questions
_COMMON = 1.2  # times the mean: answers that occur more often are GQA-OOD's head
_POPE_FIRST_ID = {"adversarial": 1, "random": 10_000_001, "popular": 20_000_001}
_RELEASE = "MME/MME_Benchmark_release_version"


def pope(probes: list[Probe]) -> dict[str, bytes]:
    """llava_pope_test.jsonl and, apart, the labels coco/coco_pope_{category}.json (JSON lines)."""
    numbers = {picture: i for i, picture in enumerate(dict.fromkeys(p.picture for p in probes))}
    asked, files = [], {}
    labels: dict[str, list[dict]] = {category: [] for category in _POPE_FIRST_ID}
    for probe in probes:
        image = f"mini_val_{numbers[probe.picture]:06d}.png"
        files[f"pope/val2014/{image}"] = probe.picture
        text = f"Is there {article(probe.name)} in the image?"
        place = len(labels[probe.category])
        label = "yes" if probe.present else "no"
        entry = {"question_id": place + 1, "image": image, "text": text, "label": label}
        labels[probe.category].append(entry)
        asked.append(_asked(_POPE_FIRST_ID[probe.category] + place, image, text, probe.category))
    files["pope/llava_pope_test.jsonl"] = as_jsonl(asked)
    for category, entries in labels.items():
        files[f"pope/coco/coco_pope_{category}.json"] = as_jsonl(entries)
    return files


def gqa(items: Sequence[Open]) -> dict[str, bytes]:
    """LLaVA's questions, GQA's and GQA-OOD's annotations in data/, pictures in data/images/."""
    items = items[::GQA_EVERY]
    names = [f"n{number:07d}" for number in range(len(items))]
    files = {
        f"gqa/data/images/{name}.jpg": jpeg(item.picture)
        for name, item in zip(names, items, strict=True)
    }
    rows = {f"20{name[1:]}": (name, item) for name, item in zip(names, items, strict=True)}
    notes = {key: _gqa_note(name, item) for key, (name, item) in rows.items()}
    files["gqa/llava_gqa_testdev_balanced.jsonl"] = as_jsonl(
        _asked(key, f"{name}.jpg", item.question) for key, (name, item) in rows.items()
    )
    files["gqa/data/testdev_balanced_questions.json"] = as_json(notes)
    for split, kept in zip(("head", "tail"), _by_frequency(items), strict=True):
        chosen = {key: notes[key] for key, keep in zip(rows, kept, strict=True) if keep}
        files[f"gqa/data/ood_testdev_{split}.json"] = as_json(chosen)
    return files


def textvqa(items: Iterable[Open]) -> dict[str, bytes]:
    """Questions with what an OCR system found (for every tenth: nothing), ten answers each."""
    asked, notes, files = [], [], {}
    for number, item in enumerate(items):
        key = f"{rank(item.id):016x}"
        found = "" if number % 10 == 9 else item.answer
        files[f"textvqa/train_images/{key}.jpg"] = jpeg(item.picture)
        asked.append(_asked(key, f"{key}.jpg", f"{item.question}\nReference OCR token: {found}"))
        answers = [item.answer] * 8 + [item.answer.upper(), "unanswerable"]
        note = {"question_id": number, "image_id": key, "question": item.question}
        notes.append(note | {"image_classes": ["Text"], "set_name": "val", "answers": answers})
    files["textvqa/llava_textvqa_val_v051_ocr.jsonl"] = as_jsonl(asked)
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    files["textvqa/TextVQA_0.5.1_val.json"] = as_json(head | {"data": notes})
    return files


def mme(claims: Iterable[Claim]) -> dict[str, bytes]:
    """llava_mme.jsonl and, a folder a category, pictures with their text files."""
    asked, files, numbers = [], {}, Counter()
    for claim in claims:
        numbers[claim.category] += 1
        name = f"{claim.category}/{numbers[claim.category]:06d}"
        files[f"{_RELEASE}/{name}.jpg"] = jpeg(claim.picture)
        pairs = ((claim.true, "Yes"), (claim.false, "No"))
        lines = (f"{text} Please answer yes or no.\t{answer}\n" for text, answer in pairs)
        files[f"{_RELEASE}/{name}.txt"] = "".join(lines).encode()
        picture = f"{name}.jpg"
        asked += [_asked(picture, picture, text, claim.category) for text, _ in pairs]
    return files | {"MME/llava_mme.jsonl": as_jsonl(asked)}


def _asked(question_id: int | str, image: str, text: str, category: str = "default") -> dict:
    """A line of LLaVA's question files."""
    return {
        "question_id": question_id,
        "image": image,
        "text": f"{text}\n{SHORT}",
        "category": category,
    }


def _gqa_note(image_id: str, item: Open) -> dict:
    return {
        "imageId": image_id,
        "question": item.question,
        "answer": item.answer.lower(),
        "isBalanced": True,
        "groups": {"global": _family(item), "local": f"10-{_family(item)}"},
    }


def _by_frequency(items: Sequence[Open]) -> tuple[list[bool], list[bool]]:
    """Which questions are in the head, and which in the tail; groups without a head: in neither."""
    groups = defaultdict(Counter)
    for item in items:
        groups[_family(item)][item.answer] += 1
    head, tail = [], []
    for item in items:
        counts = groups[_family(item)]
        bound = _COMMON * counts.total() / len(counts)
        head.append(counts[item.answer] > bound)
        tail.append(not head[-1] and max(counts.values()) > bound)
    return head, tail


def _family(item: Open) -> str:
    """What kind of answer is asked for."""
    families = {"colour": COLOURS, "shape": SHAPES, "yes or no": ("yes", "no")}
    found = (name for name, words in families.items() if item.answer in words)
    return next(found, item.category)
