"""Settings of `python -m selection`: frozen dataclasses whose fields are flags of these names.

The sentence under each field is the flag's help. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from llava.errors import UsageError, at_least

if TYPE_CHECKING:
    from selection.methods.base import Method
    from selection.store.arrays import ArrayReader


@dataclass(frozen=True)
class PoolSettings:
    """Where the samples are."""

    pool: str
    """the pool: a LLaVA JSON list or JSON lines file"""
    images: str | None = None
    """folder that the records' `image` paths are relative to; a text-only pool needs none"""
    image_roots: tuple[str, ...] = ()
    """further folders that links inside `images` may lead to, as a list: '[/data/coco]'"""
    limit: int | None = None
    """use the first LIMIT records only"""


@dataclass(frozen=True)
class ProxySettings:
    """The proxy model, which scores the pool, and how it is run."""

    model: str | None = None
    """checkpoint: LLaVA (Hugging Face or original; full, LoRA or projector), or another VLM"""
    model_base: str | None = None
    """language model under a LoRA or projector-only checkpoint: a directory or a hub name"""
    dtype: str = "auto"
    """auto (bfloat16 on a GPU that has it, float32 on a CPU), float32, bfloat16 or float16"""
    device: str = "auto"
    """auto, cpu or cuda"""
    store: str = "outputs/store"
    """folder of the signals that runs share; a signal that is there is not computed again"""
    batch_size: int = 16
    """largest number of samples in a forward pass; never changes what is chosen"""
    max_tokens: int = 16384
    """largest number of tokens, padding included, in a forward pass"""
    block_size: int = 1024
    """pool rows that are committed to the store at a time"""
    num_workers: int = -1
    """processes that open and prepare images; -1: four a GPU, none on a CPU"""
    max_bad: float = 0.001
    """share of samples that may be unusable (one always may) before the run stops with exit 65"""

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size", "max_tokens", "block_size")
        if self.num_workers < -1:
            raise UsageError(f"--num_workers {self.num_workers}: give 0 or more, or -1 for auto")
        if not 0 <= self.max_bad <= 1:
            raise UsageError(f"--max_bad {self.max_bad}: is a share of the pool, 0 to 1")


@dataclass(frozen=True)
class CostSettings:
    """Planning."""

    dry_run: bool = False
    """print the plan (samples, batches, disk, time) and stop"""


@dataclass(frozen=True)
class SelectSettings:
    """What to choose and where to write it."""

    budget: str = "0.3"
    """size of the subset: a fraction of the pool (0.3 or 30%) or a count (5000)"""
    rounding: Literal["nearest", "floor"] = "nearest"
    """how a fraction becomes a count: nearest, or floor: int(p * N), as released codes do"""
    seed: int = 0
    """seed of every random choice"""
    out: str | None = None
    """run folder; by default a new outputs/METHOD-POOL-BUDGET"""
    force_new: bool = False
    """if the run folder holds another run, write to a new one beside it (NAME-2, NAME-3, ...)"""


@dataclass(frozen=True)
class TargetSettings:
    """What the subset is wanted for."""

    targets: str
    """YAML list of the target tasks: name, data, images, weight, subtasks (docs/Selection.md)"""


@dataclass(frozen=True)
class AllSettings:
    """Which methods run, and with what."""

    methods: tuple[str, ...] = ()
    """only these, as a list: '[el2n,coincide]'; by default all that can run"""
    settings: str | None = None
    """folder of files METHOD.yaml with settings of single methods"""
    targets: str | None = None
    """YAML list of the target tasks, for the methods that have some"""
    holdout_model: str | None = None
    """the other checkpoint of rho_loss"""
    holdout_base: str | None = None
    """its base, where it is a LoRA; --model_base by default"""


@dataclass(frozen=True)
class CompareSettings:
    """Where the comparison goes."""

    out: str = "outputs/compare"
    """folder for compare.json and the pictures"""


@dataclass(frozen=True)
class VerifySettings:
    """Which run to check."""

    run: str
    """the run folder"""


_OF_PYTHON = (
    "# begun from Python, with objects that are in no file: only from there can it be replayed"
)


@dataclass(frozen=True)
class Job:
    """Everything that one run is asked for."""

    method: Method
    pool: PoolSettings
    proxy: ProxySettings = ProxySettings()
    select: SelectSettings = SelectSettings()
    targets: str | None = None
    """file of the target tasks; None for a method that has none"""
    arrays: Mapping[str, ArrayReader] = field(default_factory=dict)
    """readers of arrays that stand in the place of signals, by the signals' names"""
    command: tuple[str, ...] = ()
    """how the run was asked for, for the manifest"""

    def config(self, out: Path) -> str:
        """The settings as YAML that `python -m selection select --config` replays into `out`."""
        flat = {**asdict(self.pool), **asdict(self.proxy), **asdict(self.select)}
        origin = self.method.origin
        flat |= {**asdict(self.method.settings), "out": str(out)}
        flat["method"] = origin or self.method.name
        if self.targets:
            flat["targets"] = self.targets
        del flat["force_new"]
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in flat.items()}
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        return text if origin and not self.arrays else f"{_OF_PYTHON}\n{text}"
