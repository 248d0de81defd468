"""MME: two yes-or-no questions a picture, in ten categories of perception and four of cognition.

    llava_mme.jsonl                              what is asked; `question_id` is the picture's path
    MME_Benchmark_release_version/<category>/    <picture>.txt, in questions_answers_YN/ where there
                                                 is an images/: lines of question, tab, Yes or No

LLaVA's file leaves out MME's "Please answer yes or no."; with it put back, after one space or two,
the question is looked up in the text file. An answer counts as yes (no) if it is that word, or its
first four characters, in lower case, contain it; anything else is wrong. A picture counts for
accuracy+ when both its questions are right.

Scores are sums, not percentages: a category scores accuracy + accuracy+, so up to 200, and
perception (published, up to 2000) and cognition (up to 800) are the sums of their categories.

Differs from the official script: the two questions of a picture meet by its path, not by being
neighbours; a missing answer is wrong and shifts nothing.

Sources: Fu et al., "MME"; its eval_tool/calculation.py and LLaVA's convert_answer_to_mme.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from llava.errors import DataError, UsageError
from llava.eval.tasks.base import Id, Item, Task, check_unique, percent
from llava.eval.tasks.files import SHORT, QuestionRow, folder_of, question_file, read_rows

QUESTIONS = "llava_mme.jsonl"
RELEASE = "MME_Benchmark_release_version"
YES_OR_NO = "Please answer yes or no."
PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


class Mme(Task):
    """Metrics: `perception` (published) and `cognition`, then for each category `<category>` (the
    sum that enters them), `<category>/accuracy` and `<category>/accuracy_plus`.

    Only the last two are percentages. Categories without items are left out of the sums, so a sum
    over fewer than all ten or four is not comparable with published ones.
    """

    name = "mme"
    title = "MME"
    folder = "MME"
    place = 130
    image_folders = (RELEASE,)

    def read(self, data: Path) -> list[Item]:
        """Items in the question file's order; `id` is "<question_id> <question>"."""
        path = question_file(data, QUESTIONS)
        rows = read_rows(path, QuestionRow)
        release = folder_of(data) / RELEASE
        if not release.is_dir():
            raise UsageError(f"{release}: not found; unpack MME's {RELEASE} there")
        known: dict[Path, dict[str, str]] = {}
        items = [self._item(row, release, known, f"{path}: row {i}") for i, row in enumerate(rows)]
        check_unique(items, str(path))
        _check_pairs(items, path)
        return items

    def item_id(self, question_id: Id, prompt: str) -> Id:
        """The item of an answer-file row."""
        return f"{question_id} {question_in(prompt)}"

    def score(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, float]:
        """See the class. An item without an answer is wrong."""
        sums, details = {}, {}
        for kind, categories in (("perception", PERCEPTION), ("cognition", COGNITION)):
            groups = {name: [item for item in items if item.group == name] for name in categories}
            groups = {name: group for name, group in groups.items() if group}
            for name, group in groups.items():
                details |= _category(name, group, texts)
            if groups:
                sums[kind] = sum(details[name] for name in groups)
        return sums | details

    def submission(self, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, bytes]:
        """A file a category for MME's calculation.py, the two questions of a picture together."""
        pictures = list(dict.fromkeys(item.question_id for item in items))
        place = {picture: i for i, picture in enumerate(pictures)}
        files = defaultdict(list)
        for item in sorted(items, key=lambda item: place[item.question_id]):
            said = " ".join(texts.get(item.id, "").split())
            right = item.answers[0].capitalize()
            files[f"{item.group}.txt"].append(
                f"{item.extra['file']}\t{item.extra['asked']}\t{right}\t{said}\n"
            )
        return {name: "".join(lines).encode() for name, lines in files.items()}

    def _item(
        self, row: QuestionRow, release: Path, known: dict[Path, dict[str, str]], where: str
    ) -> Item:
        parts = PurePosixPath(str(row.question_id)).parts
        if len(parts) < 2 or ".." in parts or parts[0] not in (*PERCEPTION, *COGNITION):
            raise DataError(
                f"{where}: question_id {row.question_id!r} is not <one of MME's 14 categories>/"
                f"<picture>; give MME's {QUESTIONS}"
            )
        folder = release / parts[0]
        if (folder / "images").is_dir():
            folder /= "questions_answers_YN"
        source = folder / f"{parts[-1].split('.')[0]}.txt"
        if source not in known:
            known[source] = _answers(source)
        asked = _asked(question_in(row.text), known[source], source, where)
        return Item(
            id=self.item_id(row.question_id, row.text),
            prompt=row.text,
            answers=(known[source][asked],),
            images=(row.image,),
            group=parts[0],
            extra={"question_id": row.question_id, "asked": asked, "file": source.name},
        )


def question_in(prompt: str) -> str:
    """The question inside a prompt, without LLaVA's instruction."""
    return prompt.replace(SHORT, "").strip()


def reading(text: str) -> str:
    """How an answer is read: "yes", "no" or "other"."""
    start = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def _category(name: str, items: Sequence[Item], texts: Mapping[Id, str]) -> dict[str, float]:
    pictures = defaultdict(list)
    for item in items:
        pictures[item.question_id].append(reading(texts.get(item.id, "")) == item.answers[0])
    accuracy = percent(sum(map(sum, pictures.values())), len(items))
    plus = percent(sum(map(all, pictures.values())), len(pictures))
    return {name: accuracy + plus, f"{name}/accuracy": accuracy, f"{name}/accuracy_plus": plus}


def _answers(path: Path) -> dict[str, str]:
    """The answers of one picture's text file by question, "yes" or "no"."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}; unpack MME's {RELEASE} again") from error
    answers = {}
    for row, line in enumerate(lines):
        question, _, answer = line.strip().partition("\t")
        if answer.lower() not in ("yes", "no"):
            raise DataError(
                f"{path}: row {row}: {line!r} is not a question, a tab and Yes or No; "
                f"unpack MME's {RELEASE} again"
            )
        answers[question] = answer.lower()
    return answers


def _asked(question: str, answers: Mapping[str, str], source: Path, where: str) -> str:
    """The question as it stands in the text file."""
    for asked in (question, f"{question} {YES_OR_NO}", f"{question}  {YES_OR_NO}"):
        if asked in answers:
            return asked
    raise DataError(
        f"{where}: question {question!r} is not in {source}; take both from one release"
    )


def _check_pairs(items: Sequence[Item], path: Path) -> None:
    pictures = defaultdict(list)
    for row, item in enumerate(items):
        pictures[item.question_id].append(row)
    for picture, rows in pictures.items():
        if len(rows) != 2:
            raise DataError(
                f"{path}: row {rows[0]}: {picture} has {len(rows)} questions, but accuracy+ needs "
                "two a picture; give the whole file"
            )
