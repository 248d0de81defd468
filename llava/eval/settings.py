"""The settings of each verb of `python -m llava.eval`: a field is a flag, its text the help.

Nothing here loads PyTorch or a model, so that a wrong flag is told at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llava.errors import at_least

Reading = Literal["exact", "parse", "logit"]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What is asked of which model."""

    benchmark: str
    """name of the benchmark, such as sqa; docs/Evaluation.md lists them"""
    data: str | None = None
    """its folder, or its question file; by default its folder below playground/data/eval"""
    model: str
    """checkpoint: LLaVA (Hugging Face or original; full, LoRA or projector), or another VLM"""
    out: str
    """run folder; the same command again goes on in it"""
    images: str | None = None
    """folder of the pictures, where it is not the benchmark's own"""
    image_roots: tuple[str, ...] = ()
    """further folders that links inside `images` may lead to, as a list: '[/data/coco]'"""
    model_base: str | None = None
    """language model under a LoRA or projector-only checkpoint: a directory or a hub name"""
    symbols: str = "qwer"
    """symbols of the attack: qwer, snvf, or any distinct characters, one a position"""
    attacks: Literal["all", "clean"] = "all"
    """all: every order, letters and symbols (Clean, PA, SA, SA+PA); clean: as given, no attack"""
    orders: Literal["all", "until_failure"] = "all"
    """until_failure: ask no further once Clean and PA are known; positions are not counted then"""
    engine: Literal["shared", "naive"] = "shared"
    """shared: what the orders of a question have in common runs once; naive: one by one"""
    pictures: Literal["first", "all"] = "first"
    """of a question with several pictures (MMMU), those that the model is shown"""
    max_new_tokens: int | None = None
    """longest answer, in tokens; by default 16 to lettered questions, as no letter comes after
    more, and 128 to open ones"""
    dtype: str = "auto"
    """auto (bfloat16 on a GPU that has it, float32 on a CPU), float32, bfloat16 or float16"""
    device: str = "auto"
    """auto, cpu or cuda"""
    batch_size: int = 16
    """questions that are answered together, where each is asked once: open ones, and no attacks"""
    max_tokens: int = 32768
    """largest number of positions in a forward pass"""
    limit: int | None = None
    """ask the first LIMIT items only"""
    force_new: bool = False
    """if the run folder holds another run, write to a new one beside it (NAME-2, NAME-3, ...)"""

    def __post_init__(self) -> None:
        at_least(1, self, "max_new_tokens", "batch_size", "max_tokens", "limit")


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """What is scored."""

    benchmark: str
    """name of the benchmark, such as sqa; docs/Evaluation.md lists them"""
    data: str | None = None
    """its folder, or its question file; by default its folder below playground/data/eval"""
    answers: str
    """JSON lines, as LLaVA writes them"""
    json: bool = False
    """print one JSON object: name to number"""
    allow_missing: bool = False
    """score although items have no answer: by the rule of the benchmark's own script, which mostly
    is that they are wrong (otherwise: exit 65)"""
    submission: str | None = None
    """folder for the answers in the formats of the benchmark's server or own script"""


@dataclass(frozen=True)
class AttackSettings:
    """Which run, and how it is read."""

    run: str
    """run folder, or its attacks.jsonl"""
    reading: Reading = "exact"
    """exact: the bare symbol; parse: also "B. ..." and "The answer is B."; logit: the likeliest"""
    against: str | None = None
    """another run over the same items: its numbers minus this one's, each with a paired test"""
    json: bool = False
    """print one JSON object"""


@dataclass(frozen=True)
class TableSettings:
    """How the table is made."""

    format: Literal["markdown", "csv", "latex"] = "markdown"
    """markdown; csv (all digits, one row a model); latex (booktabs)"""
    reading: Reading = "exact"
    """how an answer under attack becomes an option: docs/Evaluation.md"""


@dataclass(frozen=True)
class PlotSettings:
    """What is drawn where."""

    out: str
    """folder for attacked.png and positions.png"""
    reading: Reading = "exact"
    """how an answer becomes an option: docs/Evaluation.md"""
