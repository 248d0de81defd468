"""The command line: flags, configuration files and presets, one flat set of names."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from llava.errors import UsageError
from llava.flags import Parser, normalised
from selection.methods import Method, get_method
from selection.settings import (
    CostSettings,
    Job,
    PoolSettings,
    ProxySettings,
    SelectSettings,
    TargetSettings,
)

T = TypeVar("T")


def parse_select(argv: list[str]) -> tuple[Job, bool]:
    """Read `[METHOD] [--flags]`: what is to be done, and whether only its cost is asked for.

    The method may stand in `--method` or in the `--config` file instead. Raises UsageError for an
    unknown method, preset or flag and for a value that cannot be.
    """
    config = _read_config(argv)
    name, argv = _method_name(argv, config)
    method = get_method(name)
    groups = (PoolSettings, ProxySettings, SelectSettings, CostSettings, method.Settings)
    if has_targets(method):
        groups = (TargetSettings, *groups)
    parser = _parser(f"python -m selection select {name}", method.__doc__, *groups)
    presets = ", ".join(method.presets) or "none for this method"
    parser.add_argument(
        "--preset", type=str | None, help=f"named settings, overridden by flags: {presets}"
    )
    parser.add_argument("--method", default=name, help="the method, for configuration files")
    if preset := value_of("--preset", argv) or config.get("preset"):
        parser.set_defaults(preset_of(method, preset))

    flat = _parse(parser, argv, groups)
    if flat["method"] != name:
        raise UsageError(f"the configuration file is for method {flat['method']!r}, not {name!r}")
    job = Job(
        method=method(_pick(method.Settings, flat)),
        pool=_pick(PoolSettings, flat),
        proxy=_pick(ProxySettings, flat),
        select=_pick(SelectSettings, flat),
        targets=flat.get("targets"),
        command=("selection", "select", name, *argv),
    )
    return job, flat["dry_run"]


def parse_plain(verb: str, about: str, argv: list[str], *groups: type) -> list[Any]:
    """Read the flags of a verb without a method: the filled settings, one of each of `groups`."""
    flat = _parse(_parser(f"python -m selection {verb}", about, *groups), argv, groups)
    return [_pick(group, flat) for group in groups]


def has_targets(method: type[Method]) -> bool:
    """Whether a method selects for target tasks."""
    return method.target_signals is not Method.target_signals


def preset_of(method: type[Method], name: str) -> dict[str, Any]:
    """The settings that preset `name` of a method names; UsageError with the nearest name."""
    if name not in method.presets:
        known = ", ".join(method.presets) or "none for this method"
        near = difflib.get_close_matches(name, method.presets, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"--preset {name}: there is {known}{hint}")
    return dict(method.presets[name])


def fill(group: type[T], values: dict[str, Any], where: str = "") -> T:
    """A settings dataclass from values by name, as YAML or a caller gives them.

    Raises UsageError, beginning with `where`, for a name that it has not and a value that cannot
    be.
    """
    names = {field.name for field in dataclasses.fields(group)}
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(f"{where}{name}: no such setting{hint}")
    try:
        return msgspec.convert(values, group, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"{where}{error}") from None


def read_yaml(path: str | Path, flag: str) -> dict[str, Any]:
    """The settings in a YAML file; UsageError, beginning with `flag`, when they cannot be read."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{flag} {path}: cannot be read ({reason})") from None
    if not isinstance(config, dict):
        raise UsageError(f"{flag} {path}: not a YAML mapping of settings")
    return config


def value_of(flag: str, argv: list[str]) -> str | None:
    """Value of the last `flag value` or `flag=value` in argv, hyphens and underscores alike."""
    argv, value = normalised(argv, ()), None
    for position, argument in enumerate(argv):
        if argument == flag and position + 1 < len(argv):
            value = argv[position + 1]
        elif argument.startswith(flag + "="):
            value = argument[len(flag) + 1 :]
    return value


def _read_config(argv: list[str]) -> dict[str, Any]:
    """What the last `--config` file says; its values are checked with the flags."""
    path = value_of("--config", argv)
    return read_yaml(path, "--config") if path else {}


def _method_name(argv: list[str], config: dict[str, Any]) -> tuple[str, list[str]]:
    if argv and not argv[0].startswith("-"):
        return argv[0], argv[1:]
    name = value_of("--method", argv) or config.get("method")
    if not name:
        raise UsageError(
            "name a method: python -m selection select METHOD [flags]; "
            "`python -m selection list` shows them"
        )
    return name, argv


def _parser(prog: str, about: str | None, *groups: type) -> Parser:
    parser = Parser(prog=prog, description=about, add_help=True)
    parser.add_argument(
        "--config", action="config", help="YAML file of settings; flags after it override it"
    )
    for group in groups:
        parser.add_class_arguments(group, as_group=True)
    return parser


def _parse(parser: Parser, argv: list[str], groups: tuple[type, ...]) -> dict[str, Any]:
    flat = parser.parse_args(normalised(argv, groups)).as_dict()
    flat.pop("config", None)
    return flat


def _pick(group: type[T], flat: dict[str, Any]) -> T:
    values = {field.name: flat[field.name] for field in dataclasses.fields(group)}
    return group(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
