"""`python -m mini score`: accuracy of any checkpoint on the small multiple choice, beside chance.

The answer is the likeliest of the symbols offered. Every kind of LLaVA that training writes can be
asked, told apart by its files; a LoRA or a projector needs the model that it was trained on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from llava.errors import UsageError
from llava.flags import Parser
from llava.model.checkpoint import Loaded, load
from mini.accuracy import Accuracy, accuracy, load_questions
from mini.build import underscored

# row of the table: (file, folder of its pictures or None for none, symbols), relative to eval/
SETS: dict[str, tuple[str, str | None, str]] = {
    "mcq_en": ("mcq_en.json", ".", "ABCDEFG"),
    "mcq_en, symbols QWER": ("mcq_en.json", ".", "QWERTYU"),
    "mcq_en, no picture": ("mcq_en.json", None, "ABCDEFG"),
    "mcq_cn": ("mcq_cn.json", ".", "ABCDEFG"),
    "scienceqa": ("scienceqa/llava_test_CQM-A.json", "scienceqa/images/test", "ABCDEFG"),
    "unseen": ("unseen/unseen.json", ".", "ABCDEFG"),
}


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """Which checkpoint is asked what."""

    model: str
    """directory of the checkpoint"""
    model_base: str | None = None
    """what a LoRA or a projector was trained on"""
    data: str = "playground/mini"
    """folder that `python -m mini build` filled"""
    questions: int | None = None
    """questions of each set, thinned evenly; by default all"""

    def __post_init__(self) -> None:
        if self.questions is not None and self.questions < 1:
            raise UsageError(f"--questions {self.questions}: ask at least one")
        if not (Path(self.data) / "eval").is_dir():
            raise UsageError(f"{self.data}/eval: not there; run `python -m mini build` first")


def main(args: Sequence[str]) -> None:
    """Parse, load, ask, and print a row as soon as it is known."""
    parser = Parser(prog="python -m mini score", description=__doc__.splitlines()[0])
    parser.add_class_arguments(ScoreSettings)
    settings = ScoreSettings(**parser.parse_args([underscored(a) for a in args]).as_dict())
    loaded = load(settings.model, base=settings.model_base, dtype=torch.float32)
    print(f"{settings.model} ({loaded.kind})", flush=True)
    for name, found in scores(loaded, Path(settings.data) / "eval", settings.questions):
        print(f"{name:<22} n {found.n:>4}  {found}", flush=True)


def scores(
    loaded: Loaded, folder: Path, limit: int | None = None
) -> Iterator[tuple[str, Accuracy]]:
    """Name and accuracy of each set under `folder` that has questions, of at most `limit` each.

    Raises UsageError when the model cannot see: it would answer the pictured questions as text.
    """
    if loaded.image_processor is None:
        raise UsageError("a model without vision; the questions are about pictures")
    if loaded.template_name == "plain":  # of the alignment stage, which has no questions
        loaded.template_name = "v1"
    for name, (file, pictures, symbols) in SETS.items():
        if json.loads((folder / file).read_bytes()):  # a world of PyPI alone has no `unseen`
            questions = load_questions(folder / file, limit)
            yield name, accuracy(loaded, questions, pictures and folder / pictures, symbols)
