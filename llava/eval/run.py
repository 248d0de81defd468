"""One evaluation: a benchmark's questions put to a model, every answer kept, the numbers last.

Processes need not know of each other: each looks which units the part files lack, takes one, and
adds it; of P processes number r starts r / P along what is missing, so they meet only at the end. A
restart, with any number of processes, goes on in the same way. The process that finds all units
writes the run's files, `manifest.json` last; if two do, they write the same.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
import transformers
import xxhash

from llava import files
from llava.errors import UsageError
from llava.eval import prompts as asking
from llava.eval.engine import MAX_NEW_TOKENS, Ask, Engine, Reply, open_engine
from llava.eval.numbers import collect, summarise
from llava.eval.pictures import Pictures, picture_folder
from llava.eval.prompts import Plan, Replier
from llava.eval.question import LETTERS
from llava.eval.records import (
    ANSWERS,
    ATTACKS,
    Head,
    Parts,
    Record,
    Unit,
    read_attacks,
    write_answers,
    write_attacks,
    write_submission,
)
from llava.eval.tasks import find_task
from llava.eval.tasks.base import Item
from llava.progress import Progress
from llava.runs import claim_folder
from llava.vlm import load_vlm
from llava.vlm.base import Vlm

SCHEMA = 2
"""Raised when the code asks or decodes otherwise for the same settings."""
LETTERED_TOKENS = 16
"""Longest answer to a lettered question: a letter, or a sentence that names one."""


@dataclass(frozen=True)
class RunSettings:
    """What is asked of which model."""

    benchmark: str
    """name of the benchmark, such as sqa; docs/Evaluation.md lists them"""
    data: str
    """its folder, or its question file"""
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
        for name in ("max_new_tokens", "batch_size", "max_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value}: give a number of at least 1")


class Evaluation:
    """An evaluation by one process of `world_size`."""

    def __init__(self, settings: RunSettings, rank: int = 0, world_size: int = 1) -> None:
        """Read and check all that can be told without the model."""
        self.settings, self.rank, self.world_size = settings, rank, world_size
        data = Path(settings.data)
        self.task = find_task(settings.benchmark)
        self.items = self.task.read(data)[: settings.limit]
        self.task.score(self.items, {})  # a file without right answers is told now
        self.plan = _plan(settings, self.items, self.task.attacked)
        self.pictures = Pictures(
            picture_folder(self.task, data, settings.images),
            tuple(map(Path, settings.image_roots)),
            settings.pictures == "first",
        )
        self.pictures.check(self.items)
        self.units = asking.units(self.items, self.plan)

    @cached_property
    def vlm(self) -> Vlm:
        settings = self.settings
        return load_vlm(settings.model, settings.model_base, settings.dtype, settings.device)

    @cached_property
    def engine(self) -> Engine:
        settings = self.settings
        return open_engine(settings.engine, self.vlm, self.max_new_tokens, settings.max_tokens)

    @property
    def max_new_tokens(self) -> int:
        """Where an answer ends that has not ended by itself."""
        longest = LETTERED_TOKENS if self.task.attacked else MAX_NEW_TOKENS
        return self.settings.max_new_tokens or longest

    @property
    def model_name(self) -> str:
        """As LLaVA names a model: its folder, and the one above for a checkpoint of a training."""
        path = Path(self.settings.model).resolve()
        is_step = path.name.startswith("checkpoint-")
        return f"{path.parent.name}_{path.name}" if is_step else path.name

    def execute(self) -> Path:
        """Ask what is missing, and put the run together. Returns the run folder."""
        wanted = Path(self.settings.out), self.settings.force_new
        out, finished = claim_folder(wanted, self._identity())
        if not finished:
            self._note_equal_symbols()
            parts = Parts(out / "parts", self.rank)
            self._ask_missing(parts)
            if not (out / "manifest.json").exists():
                self._finish(out, parts)
        return out

    def _note_equal_symbols(self) -> None:
        for symbols in self.plan.symbols if self.rank == 0 else ():
            n = max(len(item.question.options) for item in self.items)
            if len({self.vlm.first_token(symbol) for symbol in symbols[:n]}) < n:
                print(
                    f"note: some of {symbols[:n]} begin with the same token in this model, so the "
                    "reading logit cannot tell them apart",
                    file=sys.stderr,
                )

    def _ask_missing(self, parts: Parts) -> None:
        done = parts.refresh()
        size = 1 if self.plan.all_orders else self.settings.batch_size
        total = len(self.units) - len(done)
        with Progress(self.task.name, total, self.rank == 0) as progress:
            while len(done) < len(self.units):
                missing = [unit for unit in range(len(self.units)) if unit not in done]
                start = self.rank % self.world_size * len(missing) // self.world_size
                parts.add(self._ask(missing[start : start + size]))
                before, done = len(done), parts.refresh()
                progress.advance(len(done) - before)

    def _ask(self, numbers: Sequence[int]) -> Iterator[Unit]:
        """Finished units; those with a single prompt are answered together."""
        started = time.monotonic()
        if self.plan.all_orders:
            for number in numbers:
                records, n_tokens = self._attack(self.units[number])
                yield Unit(number, time.monotonic() - started, n_tokens, records)
            return
        firsts = [self.items[self.units[number][0]] for number in numbers]
        asks = [asking.prompts(item, self.plan)[0] for item in firsts]
        opened = [self.pictures.open(item) for item in firsts]
        replies = self.engine.reply_many(list(zip(opened, asks, strict=True)))
        seconds = (time.monotonic() - started) / len(numbers)
        for number, reply in zip(numbers, replies, strict=True):
            records = self._records(self.units[number], lambda asks, reply=reply: [reply], {})
            yield Unit(number, seconds, 0, records)

    def _attack(self, rows: Sequence[int]) -> tuple[list[Record], int]:
        """Records of the rows of one question, and the positions that the model processed."""
        sources: dict[Ask, int] = {}
        for row in rows:
            for ask in asking.prompts(self.items[row], self.plan):
                sources.setdefault(ask, row)
        numbers = {ask: i for i, ask in enumerate(sources)}
        session = self.engine.item(self.pictures.open(self.items[rows[0]]), list(sources))
        known: dict[int, Reply] = {}

        def reply(asks: Sequence[Ask]) -> list[Reply]:
            wanted = [numbers[ask] for ask in asks]
            new = [i for i in dict.fromkeys(wanted) if i not in known]
            if new:
                known.update(zip(new, session.reply(new), strict=True))
            return [known[i] for i in wanted]

        if not self.plan.until_failure:
            reply(list(sources))  # letters and symbols in one batch
        return self._records(rows, reply, sources), session.n_tokens

    def _records(
        self, rows: Sequence[int], reply: Replier, sources: dict[Ask, int]
    ) -> list[Record]:
        return [
            asking.record(
                asked,
                row,
                self.items[row],
                self.task.counted(self.items[row]),
                sources.get(asked.ask, rows[0]),
            )
            for row in rows
            for asked in asking.put(self.items[row], self.plan, reply)
        ]

    def _finish(self, out: Path, parts: Parts) -> None:
        """Write everything that the units say, the manifest last.

        Temporary files are not swept: another process may be writing the same.
        """
        given, seconds, n_tokens = self._given(parts)
        prompts = map(self.task.recorded, self.items)
        write_answers(out / ANSWERS, zip(given, prompts, strict=True), self.model_name)
        summary = self._describe(seconds, n_tokens)
        texts = {item.id: record.text for item, record in zip(self.items, given, strict=True)}
        write_submission(out / "submission", self.task.submission(self.items, texts))
        summary["published"] = self.task.score(self.items, texts)
        if self.task.attacked:
            write_attacks(out / ATTACKS, self._head(), parts, len(self.units))
            summary |= summarise(collect(*read_attacks(out / ATTACKS), out / ATTACKS))
        files.atomic_write(out / "summary.json", _json(summary))
        files.atomic_write(out / "manifest.json", _json(self._manifest(out)))

    def _given(self, parts: Parts) -> tuple[list[Record], float, int]:
        """The record of each item as it is given; seconds and positions of all units."""
        given: dict[int, Record] = {}
        seconds, n_tokens = 0.0, 0
        for number in range(len(self.units)):
            unit = parts[number]
            seconds, n_tokens = seconds + unit.seconds, n_tokens + unit.n_tokens
            given |= {
                record.row: record
                for record in unit.records
                if record.is_given and LETTERS.startswith(record.symbols)
            }
        return [given[row] for row in range(len(self.items))], seconds, n_tokens

    def _head(self) -> Head:
        return Head(
            benchmark=self.task.name,
            model=self.model_name,
            n_items=len(self.items),
            letters=LETTERS,
            symbols="".join(self.plan.symbols[1:]),
            all_orders=self.plan.all_orders,
            until_failure=self.plan.until_failure,
        )

    def _describe(self, seconds: float, n_tokens: int) -> dict[str, Any]:
        """What was asked, for whoever reads the numbers."""
        return {
            **msgspec.to_builtins(self._head()),
            "limit": self.settings.limit,
            "engine": self.settings.engine,
            "dtype": self.vlm.identity()["dtype"],
            "seconds": round(seconds, 2),
            "n_tokens": n_tokens or None,  # not counted where single prompts go together
        }

    def _identity(self) -> dict[str, Any]:
        """What this run is: another value of any of these is another run (promise P10)."""
        settings = self.settings
        return {
            "benchmark": {
                "name": self.task.name,
                "limit": settings.limit,
                "n_items": len(self.items),
                "content": _fingerprint(self.items),
            },
            "model": self.vlm.identity(),
            "symbols": list(self.plan.symbols),
            "attacks": settings.attacks,
            "orders": settings.orders,
            "engine": settings.engine,
            "pictures": settings.pictures,
            "max_new_tokens": self.max_new_tokens,
            "schema": SCHEMA,
        }

    def _manifest(self, out: Path) -> dict[str, Any]:
        names = [name for name in (ANSWERS, ATTACKS, "summary.json") if (out / name).exists()]
        return {
            "settings": asdict(self.settings),
            "files": {name: xxhash.xxh3_128_hexdigest((out / name).read_bytes()) for name in names},
            "processes": self.world_size,
            "device": _device(self.vlm.device),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


def place_in_launch() -> tuple[int, int]:
    """Rank and number of processes of this torchrun launch; (0, 1) without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _plan(settings: RunSettings, items: Sequence[Item], attacked: bool) -> Plan:
    if not attacked:
        return Plan(settings.benchmark, (), all_orders=False)
    n = max(len(item.question.options) for item in items)
    if n > len(LETTERS):
        raise UsageError(
            f"{settings.benchmark}: a question has {n} options; at most {len(LETTERS)}"
        )
    if settings.attacks == "clean":
        return Plan(settings.benchmark, (LETTERS,), all_orders=False)
    symbols = LETTERS, asking.pick_symbols(settings.symbols, n)
    return Plan(settings.benchmark, symbols, until_failure=settings.orders == "until_failure")


def _fingerprint(items: Sequence[Item]) -> str:
    """Hash of all that is asked and held for right; of picture files the names only."""
    hasher = xxhash.xxh3_128()
    for item in items:
        hasher.update(msgspec.json.encode(item, enc_hook=repr))
    return hasher.hexdigest()


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
