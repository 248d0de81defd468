"""`python -m mini warmup`: the proxy, the base weights after a random 5 % of the pool.

The real training path does the work (`python -m llava.train`, full fine-tuning with the vision
tower frozen); about a minute on two cores.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from llava.errors import UsageError
from llava.files import atomic_write, make_folder
from llava.flags import Parser
from llava.model.checkpoint import load
from llava.train.__main__ import train
from llava.train.arguments import parse
from mini import SHIPPED
from mini.accuracy import accuracy, load_questions
from selection.pool.pool import Pool


@dataclasses.dataclass(frozen=True)
class WarmupSettings:
    """What the proxy is trained on, and how."""

    data: str = "playground/mini"
    """folder that `python -m mini build` filled"""
    base: str = str(SHIPPED)
    """folder of base weights: llama/, clip/ and projector.safetensors"""
    out: str = "playground/mini/proxy"
    """folder for the checkpoint; the samples used are written beside it"""
    share: float = 0.05
    """share of the pool, drawn at random"""
    seed: int = 0
    """seed of the draw and of the training order"""
    epochs: float = 1.0
    """passes over the drawn samples"""
    learning_rate: float = 2e-5
    """peak; cosine decay after 3 % warm-up, as in LLaVA"""
    batch_size: int = 16
    """samples a step"""
    questions: int = 300
    """questions of mcq_en that accuracy is measured on; 0 measures none"""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"--share {self.share}: is a share of the pool, above 0 to 1")


def main(args: Sequence[str]) -> None:
    """Parse, train and measure, or say what was measured when this very proxy is there."""
    parser = Parser(prog="python -m mini warmup", description=__doc__.splitlines()[0])
    parser.add_class_arguments(WarmupSettings)
    settings = WarmupSettings(**parser.parse_args(list(args)).as_dict())
    done, made_from = Path(settings.out) / "warmup.json", identity(settings)
    if done.is_file():
        former = json.loads(done.read_text(encoding="utf-8"))
        if former["made_from"] == made_from:
            print(f"{settings.out}: already warmed up\n{former['report']}")
            return
        shutil.rmtree(settings.out)
    started = time.monotonic()
    warm_up(settings)
    lines = [f"{settings.out}: warmed up in {time.monotonic() - started:.0f} s"]
    if settings.questions:
        lines.append(report(settings.out, settings.data, settings.questions))
        print("\n".join(lines))
    record = {"made_from": made_from, "report": "\n".join(lines[1:])}
    atomic_write(done, json.dumps(record, indent=1).encode())


def identity(settings: WarmupSettings) -> dict[str, Any]:
    """What decides the proxy: pool, base weights and settings."""
    chosen = dataclasses.asdict(settings)
    for place in ("data", "base", "out"):
        del chosen[place]
    base = Path(settings.base)
    files = sorted(path for path in base.rglob("*") if path.is_file())
    return {
        "pool": Pool.open(_pool_file(settings)).sha256,
        "base": {
            str(path.relative_to(base)): xxhash.xxh3_128_hexdigest(path.read_bytes())
            for path in files
        },
        "settings": chosen,
    }


def _pool_file(settings: WarmupSettings) -> Path:
    path = Path(settings.data) / "pool.json"
    if not path.is_file():
        raise UsageError(f"{path}: not there; run `python -m mini build` first")
    return path


def warm_up(settings: WarmupSettings) -> None:
    """Draw the samples and train the proxy on them."""
    data, base, out = Path(settings.data), Path(settings.base), Path(settings.out)
    records = out.parent / "warmup_samples.json"
    pool = Pool.open(_pool_file(settings))
    n = max(1, round(settings.share * len(pool)))
    rows = sorted(random.Random(settings.seed).sample(range(len(pool)), n))
    make_folder(out.parent)
    atomic_write(records, b"[\n" + b",\n".join(bytes(pool.raw(row)) for row in rows) + b"\n]\n")
    flags = {
        "model_name_or_path": base / "llama",
        "vision_tower": base / "clip",
        "pretrain_mm_mlp_adapter": base / "projector.safetensors",
        "version": "v1",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "data_path": records,
        "image_folder": data / "images",
        "image_aspect_ratio": "pad",
        "output_dir": out,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.batch_size,
        "warmup_ratio": 0.03,
        "lr_scheduler_type": "cosine",
        "group_by_modality_length": True,
        "model_max_length": 512,
        "seed": settings.seed,
    }
    train(parse([word for name, value in flags.items() for word in (f"--{name}", str(value))]))


def report(checkpoint: str | Path, data: str | Path, n_questions: int) -> str:
    """Accuracy lines: as asked, under other symbols, and without the pictures."""
    loaded = load(checkpoint, dtype=torch.float32)
    folder = Path(data) / "eval"
    questions = load_questions(folder / "mcq_en.json", n_questions)
    rows = {
        "mcq_en": accuracy(loaded, questions, folder),
        "mcq_en, symbols QWER": accuracy(loaded, questions, folder, "QWERTYU"),
        "mcq_en, no picture": accuracy(loaded, questions, None),
    }
    return "\n".join(f"{name:<22} {value}" for name, value in rows.items())
