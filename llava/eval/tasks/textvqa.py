"""TextVQA: reading text in pictures, ten annotators' answers a question.

    llava_textvqa_val_v051_ocr.jsonl     what is asked; `question_id` is the picture's, so questions
                                         are told apart by (question_id, question in lower case)
    TextVQA_0.5.1_val.json               {"data": [{"image_id", "question", "answers"}, ...]}

An answer scores min(1, matches / 3) against each nine of the ten annotated answers, averaged; it is
normalised as on the EvalAI server first (`normalise`), as the annotated ones are.

Sources: Singh et al., "Towards VQA Models That Can Read"; LLaVA's eval_textvqa and the M4C
evaluator that it takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from llava.errors import DataError, UsageError
from llava.eval.tasks.base import Id, Item, Task, check_unique, percent
from llava.eval.tasks.files import (
    QuestionRow,
    find_file,
    folder_of,
    question_file,
    read_document,
    read_rows,
)

QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
ANSWERS = "TextVQA_0.5.1_val.json"
N_ANNOTATORS = 10
_OCR = "Reference OCR token: "
_OCR_FIRST = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


class Annotation(msgspec.Struct):
    """One question with its annotators' answers."""

    image_id: Id
    question: str
    answers: list[str]


class Annotations(msgspec.Struct):
    """TextVQA_0.5.1_val.json."""

    data: list[Annotation]


class TextVqa(Task):
    """Metric: `accuracy`, the mean soft accuracy."""

    name = "textvqa"
    title = "TextVQA"
    place = 120
    image_folders = ("train_images",)

    def read(self, data: Path) -> list[Item]:
        """Items in the question file's order; `id` is "<question_id> <question>"."""
        path = question_file(data, QUESTIONS)
        rows = read_rows(path, QuestionRow)
        answers = _answers(folder_of(data))
        items = [self._item(row, answers, f"{path}: row {i}") for i, row in enumerate(rows)]
        check_unique(items, str(path))
        return items

    def item_id(self, question_id: Id, prompt: str) -> Id:
        """The item of an answer-file row; DataError for a prompt of no known layout."""
        return _key(question_id, question_in(prompt))

    def score(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, float]:
        """See the class. An item without an answer scores 0."""
        total = sum(soft_accuracy(texts[i.id], i.answers) for i in items if i.id in texts)
        return {"accuracy": percent(total, len(items))}

    def _item(self, row: QuestionRow, answers: Mapping[str, Sequence[str]], where: str) -> Item:
        try:
            key = self.item_id(row.question_id, row.text)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if key not in answers:
            raise DataError(f"{where}: {key!r} is not in {ANSWERS}; take both of version 0.5.1")
        return Item(
            id=key,
            prompt=row.text,
            answers=tuple(answers[key]),
            images=(row.image,),
            extra={"question_id": row.question_id},
        )


def question_in(prompt: str) -> str:
    """The question inside a prompt, lower-case. Three layouts are known:

    "OCR tokens: ... Question: <question> Short answer:"; three lines, one of them the OCR tokens,
    first or after the question; two lines, the question and the instruction.
    """
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        if match := _OCR_FIRST.search(prompt):
            return match[1].lower()
    elif _OCR in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith(_OCR.rstrip()) else 0].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    raise DataError(
        f"prompt {prompt[:60]!r} has no known layout; give question, OCR tokens and instruction "
        "a line each"
    )


def soft_accuracy(text: str, annotated: Sequence[str]) -> float:
    """Mean of min(1, matches / 3) of `text` over leaving out each one of `annotated`, in [0, 1]."""
    answer = normalise(text)
    matches = [normalise(other) == answer for other in annotated]
    return sum(min(1.0, (sum(matches) - match) / 3) for match in matches) / len(matches)


def _answers(folder: Path) -> dict[str, list[str]]:
    """The annotated answers by item id; of two entries for one question the last counts."""
    path = find_file(folder, ANSWERS, ())
    if path is None:
        raise UsageError(f"{folder / ANSWERS}: not found; take it from textvqa.org")
    entries = read_document(path, Annotations).data
    for i, entry in enumerate(entries):
        if len(entry.answers) != N_ANNOTATORS:
            raise DataError(
                f"{path}: row {i}: {len(entry.answers)} answers, but each question has "
                f"{N_ANNOTATORS}; take the released file"
            )
    return {_key(entry.image_id, entry.question.lower()): entry.answers for entry in entries}


def _key(question_id: Id, question: str) -> str:
    return f"{question_id} {question}"


# ---- how answers are compared

_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32
_ARTICLES = {"a", "an", "the"}
_NUMBERS = dict(
    zip(
        "none zero one two three four five six seven eight nine ten".split(),
        "0 0 1 2 3 4 5 6 7 8 9 10".split(),
        strict=True,
    )
)
# Each is reached from every form that lacks exactly one of its apostrophes.
_WITH_APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
    mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll
    you're you've
""".split()
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _WITH_APOSTROPHES
    for i, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}


def normalise(answer: str) -> str:
    """`answer` as the EvalAI server compares it, in TextVQA as in VQAv2 and VizWiz.

    Lower-case, without articles, numbers up to ten as digits. Its published form has quirks, and
    published numbers have them too, so they are kept:

        period         every "." that no digit follows goes, also after a digit ("3." is "3"): the
                       condition on the character before it was mistyped. Only the first 32 of them
                       go, because a flag was passed where the count belongs.
        punctuation    a mark beside a space ANYWHERE in the text is deleted everywhere ("a-b - c"
                       is "ab c"); a mark that is nowhere beside a space becomes a space.
        "'s"           gets a space before it: "that's" is "that 's", but "thats" becomes "that's".
        contractions   "somebody'd" loses its apostrophe, where all others get one.

    Left out, because it cannot happen once commas are gone: the rule for commas between digits, and
    contractions with capitals ("Im"), since the text is lower-case by then.
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return " ".join(_word(word) for word in _without_marks(text).split() if word not in _ARTICLES)


def _without_marks(text: str) -> str:
    beside_space = {mark for mark in _PUNCTUATION if f"{mark} " in text or f" {mark}" in text}
    table = {ord(mark): "" if mark in beside_space else " " for mark in _PUNCTUATION}
    return _PERIOD.sub("", text.translate(table), count=_MAX_PERIODS)


def _word(word: str) -> str:
    word = _NUMBERS.get(word, word)
    return _CONTRACTIONS.get(word, word)
