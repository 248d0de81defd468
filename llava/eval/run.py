"""One evaluation: a benchmark's questions put to a model, every answer kept, the numbers last.

Processes need not know of each other: each looks which units the part files lack, takes one, and
adds it; of P processes number r starts r / P along what is missing, so they meet only at the end. A
restart, with any number of processes, goes on in the same way. The process that finds all units
writes the run's files, `manifest.json` last; if two do, they write the same.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import xxhash

from llava import files
from llava.errors import UsageError
from llava.eval.numbers import collect, summarise
from llava.eval.question import LETTERS, Ask
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
from llava.eval.schedule import Replier, Schedule, pick_symbols
from llava.eval.settings import RunSettings
from llava.eval.tasks import EVAL, Item, find_task
from llava.progress import Progress
from llava.runs import claim_folder

if TYPE_CHECKING:  # torch and models take seconds to load: a wrong flag or file is told before
    from llava.eval.engine import Engine
    from llava.vlm.base import Vlm

SCHEMA = 2
"""Raised when the code asks or decodes otherwise for the same settings."""
LETTERED_TOKENS = 16
"""Longest answer to a lettered question: a letter, or a sentence that names one."""


class Evaluation:
    """An evaluation by one process of `world_size`."""

    def __init__(self, settings: RunSettings, rank: int = 0, world_size: int = 1) -> None:
        """Read and check all that can be told without the model."""
        from llava.eval.pictures import Pictures, picture_folder

        self.rank, self.world_size = rank, world_size
        self.task = find_task(settings.benchmark)
        if settings.data is None:
            settings = replace(settings, data=str(EVAL / self.task.folder))
        self.settings, data = settings, Path(settings.data)
        self.items = self.task.read(data)[: settings.limit]
        self.task.score(self.items, {})  # a file without right answers is told now
        self.schedule = _schedule(settings, self.items, self.task.attacked)
        self.pictures = Pictures(
            picture_folder(self.task, data, settings.images),
            tuple(map(Path, settings.image_roots)),
            settings.pictures == "first",
        )
        self.pictures.check(self.items)
        self.units = self.schedule.units(self.items)

    @cached_property
    def vlm(self) -> Vlm:
        from llava.vlm import load_vlm

        settings = self.settings
        return load_vlm(settings.model, settings.model_base, settings.dtype, settings.device)

    @cached_property
    def engine(self) -> Engine:
        from llava.eval.engine import open_engine

        settings = self.settings
        return open_engine(settings.engine, self.vlm, self.max_new_tokens, settings.max_tokens)

    @property
    def max_new_tokens(self) -> int:
        """Where an answer ends that has not ended by itself."""
        from llava.eval.engine import MAX_NEW_TOKENS

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
        folder = Path(self.settings.out), self.settings.force_new
        out, finished = claim_folder(folder, self._identity())
        if not finished:
            self._note_equal_symbols()
            parts = Parts(out / "parts", self.rank)
            self._ask_missing(parts)
            if not (out / "manifest.json").exists():
                self._finish(out, parts)
        return out

    def _note_equal_symbols(self) -> None:
        for symbols in self.schedule.symbols if self.rank == 0 else ():
            n = max(len(item.question.options) for item in self.items)
            if len({self.vlm.first_token(symbol) for symbol in symbols[:n]}) < n:
                print(
                    f"note: some of {symbols[:n]} begin with the same token in this model, so the "
                    "reading logit cannot tell them apart",
                    file=sys.stderr,
                )

    def _ask_missing(self, parts: Parts) -> None:
        done = parts.refresh()
        size = 1 if self.schedule.all_orders else self.settings.batch_size
        total = len(self.units) - len(done)
        with Progress(self.task.name, total, self.rank == 0) as progress:
            while len(done) < len(self.units):
                missing = [unit for unit in range(len(self.units)) if unit not in done]
                start = self.rank % self.world_size * len(missing) // self.world_size
                ask = self._ask_all_orders if self.schedule.all_orders else self._ask_once
                parts.add(ask(missing[start : start + size]))
                before, done = len(done), parts.refresh()
                progress.advance(len(done) - before)

    def _ask_all_orders(self, numbers: Sequence[int]) -> Iterator[Unit]:
        """Finished units, each by itself: everything about its pictures in one session."""
        for number in numbers:
            started = time.monotonic()
            unit = self.units[number]
            sources = self.schedule.sources(self.items, unit)
            pictures = self.pictures.open(self.items[unit[0]])
            session = self.engine.item(pictures, list(sources))
            if not self.schedule.until_failure:
                session.reply(list(sources))  # letters and symbols in one batch
            records = self._records(unit, session.reply, sources)
            yield Unit(number, time.monotonic() - started, session.n_tokens, records)

    def _ask_once(self, numbers: Sequence[int]) -> Iterator[Unit]:
        """Finished units, each of a single prompt, answered together."""
        started = time.monotonic()
        units = [self.units[number] for number in numbers]
        sources = [self.schedule.sources(self.items, unit) for unit in units]
        pictures = [self.pictures.open(self.items[unit[0]]) for unit in units]
        asks = [ask for (ask,) in sources]
        replies = self.engine.reply_many(list(zip(pictures, asks, strict=True)))
        seconds = (time.monotonic() - started) / len(numbers)
        for number, unit, source, reply in zip(numbers, units, sources, replies, strict=True):
            records = self._records(unit, lambda asks, reply=reply: [reply], source)
            yield Unit(number, seconds, 0, records)

    def _records(
        self, unit: Sequence[int], reply: Replier, sources: Mapping[Ask, int]
    ) -> list[Record]:
        """What is written down of a unit: the records of all its rows."""
        return [
            asked.record(row, item, self.task.counted(item), sources[asked.ask])
            for row, item in ((row, self.items[row]) for row in unit)
            for asked in self.schedule.put(item, reply)
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
            symbols="".join(self.schedule.symbols[1:]),
            all_orders=self.schedule.all_orders,
            until_failure=self.schedule.until_failure,
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
            "symbols": list(self.schedule.symbols),
            "attacks": settings.attacks,
            "orders": settings.orders,
            "engine": settings.engine,
            "pictures": settings.pictures,
            "max_new_tokens": self.max_new_tokens,
            "schema": SCHEMA,
        }

    def _manifest(self, out: Path) -> dict[str, Any]:
        import torch
        import transformers

        names = [name for name in (ANSWERS, ATTACKS, "summary.json") if (out / name).exists()]
        device = self.vlm.device
        on_gpu = device.type == "cuda"
        return {
            "settings": asdict(self.settings),
            "files": {name: files.digest_of(out / name, xxhash.xxh3_128) for name in names},
            "processes": self.world_size,
            "device": torch.cuda.get_device_name(device) if on_gpu else str(device),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


def _schedule(settings: RunSettings, items: Sequence[Item], attacked: bool) -> Schedule:
    """What `settings` ask for; UsageError for symbols or options that do not go together."""
    if not attacked:
        return Schedule(settings.benchmark, (), all_orders=False)
    n = max(len(item.question.options) for item in items)
    if n > len(LETTERS):
        raise UsageError(
            f"{settings.benchmark}: a question has {n} options; at most {len(LETTERS)}"
        )
    if settings.attacks == "clean":
        return Schedule(settings.benchmark, (LETTERS,), all_orders=False)
    symbols = LETTERS, pick_symbols(settings.symbols, n)
    return Schedule(settings.benchmark, symbols, until_failure=settings.orders == "until_failure")


def _fingerprint(items: Sequence[Item]) -> str:
    """Hash of all that is asked and held for right; of picture files the names only."""
    hasher = xxhash.xxh3_128()
    for item in items:
        hasher.update(msgspec.json.encode(item, enc_hook=repr))
    return hasher.hexdigest()


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
