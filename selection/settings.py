"""Flags, configuration files and presets of `python -m selection`: one flat set of names."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import Namespace

from llava.errors import UsageError
from llava.flags import Parser, normalised
from selection.methods import Method, get_method


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
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
        for name in ("batch_size", "max_tokens", "block_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} {getattr(self, name)}: give a number of at least 1")
        if self.num_workers < -1:
            raise UsageError(f"--num_workers {self.num_workers}: give 0 or more, or -1 for auto")
        if not 0 <= self.max_bad <= 1:
            raise UsageError(f"--max_bad {self.max_bad}: is a share of the pool, 0 to 1")


@dataclasses.dataclass(frozen=True)
class PlanSettings:
    """Planning."""

    dry_run: bool = False
    """print the plan (samples, batches, disk, time) and stop"""


@dataclasses.dataclass(frozen=True)
class VerifySettings:
    """Which run to check."""

    run: str
    """the run folder"""


@dataclasses.dataclass(frozen=True)
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


@dataclasses.dataclass(frozen=True)
class TargetSettings:
    """What the subset is wanted for."""

    targets: str
    """YAML list of the target tasks: name, data, images, weight, subtasks (docs/Selection.md)"""


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything one `select` was asked for."""

    pool: PoolSettings
    proxy: ProxySettings
    select: SelectSettings
    targets: str | None
    """file of the target tasks; None for a method that has none"""
    dry_run: bool
    method: Method
    flat: dict
    """every setting by its flag's name, as written to config.yaml"""


def parse_select(argv: list[str]) -> Run:
    """Read `[METHOD] [--flags]`; the method may stand in the `--config` file instead.

    Raises UsageError for an unknown method, preset or flag and for a value that cannot be.
    """
    name, argv = _method_name(argv)
    method_type = get_method(name)
    groups = (PoolSettings, ProxySettings, SelectSettings, PlanSettings, method_type.Settings)
    if method_type.target_signals is not Method.target_signals:
        groups = (TargetSettings, *groups)
    parser = _parser(f"python -m selection select {name}", method_type.__doc__, *groups)
    _add_presets(parser, method_type, argv)
    parser.add_argument("--method", default=name, help="the method, for configuration files")
    flat = _parse(parser, argv, groups)
    if flat["method"] != name:
        raise UsageError(f"the configuration file is for method {flat['method']!r}, not {name!r}")
    return Run(
        pool=_pick(PoolSettings, flat),
        proxy=_pick(ProxySettings, flat),
        select=_pick(SelectSettings, flat),
        targets=flat.get("targets"),
        dry_run=flat["dry_run"],
        method=method_type(_pick(method_type.Settings, flat)),
        flat=flat,
    )


def _add_presets(parser: Parser, method_type: type[Method], argv: list[str]) -> None:
    """Add `--preset`, and make the values of the one that argv or its file names defaults."""
    presets = method_type.presets
    known = ", ".join(presets) or "none for this method"
    parser.add_argument(
        "--preset", type=str | None, help=f"named settings, overridden by flags: {known}"
    )
    preset = _value_of("--preset", argv) or _from_config(argv).get("preset")
    if preset:
        if preset not in presets:
            raise UsageError(f"--preset {preset}: there is {known}{_nearest(preset, presets)}")
        parser.set_defaults(presets[preset])


def parse_plain(verb: str, about: str, argv: list[str], *groups: type) -> tuple[list, dict]:
    """Read the flags of a verb without a method: the filled settings, and all values by name."""
    flat = _parse(_parser(f"python -m selection {verb}", about, *groups), argv, groups)
    return [_pick(group, flat) for group in groups], flat


def dump(flat: dict) -> str:
    """The flat settings as YAML that `--config` reads back."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in flat.items()}
    keys = {key: value for key, value in plain.items() if key not in ("force_new", "dry_run")}
    return yaml.safe_dump(keys, sort_keys=False, allow_unicode=True)


def _parser(prog: str, about: str | None, *groups: type) -> Parser:
    parser = Parser(prog=prog, description=about, add_help=True)
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; flags after it override it"
    )
    for group in groups:
        parser.add_class_arguments(group, as_group=True)
    return parser


def _parse(parser: Parser, argv: list[str], groups: tuple[type, ...]) -> dict:
    parsed: Namespace = parser.parse_args(normalised(argv, groups))
    flat = parsed.as_dict()
    flat.pop("config", None)
    return flat


def _pick(group: type, flat: dict):
    values = {field.name: flat[field.name] for field in dataclasses.fields(group)}
    return group(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _method_name(argv: list[str]) -> tuple[str, list[str]]:
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    name = _from_config(argv).get("method")
    if not name:
        raise UsageError(
            "name a method: python -m selection select METHOD [flags]; "
            "`python -m selection list` shows them"
        )
    return name, argv


def _from_config(argv: list[str]) -> dict:
    path = _value_of("--config", argv)
    if not path:
        return {}
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"--config {path}: cannot be read ({reason})") from None
    if not isinstance(config, dict):
        raise UsageError(f"--config {path}: not a YAML mapping of settings")
    return config


def _value_of(flag: str, argv: list[str]) -> str | None:
    """Value of the last `flag value` or `flag=value` in argv."""
    value = None
    for position, argument in enumerate(argv):
        if argument == flag and position + 1 < len(argv):
            value = argv[position + 1]
        elif argument.startswith(flag + "="):
            value = argument[len(flag) + 1 :]
    return value


def _nearest(word: str, known) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
