"""The command line: flags, configuration files and presets, one flat set of names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
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
    groups = (*_groups(method), CostSettings, method.Settings)
    parser = _select_parser(name, method, groups)
    if preset := value_of("--preset", argv) or config.get("preset"):
        parser.set_defaults(preset_of(method, preset))
    flat = _parse(parser, argv, groups)
    if flat["method"] != name and get_method(flat["method"]) is not method:
        raise UsageError(f"the configuration file is for method {flat['method']!r}, not {name!r}")
    made = method(_pick(method.Settings, flat))
    return _job(made, flat, ("selection", "select", name, *argv)), flat["dry_run"]


def job_of(method: Method | type[Method], values: Mapping[str, Any], preset: str | None) -> Job:
    """The same from Python: what the flags in `values`, by name, ask of a method.

    A method object has its settings already. Raises the errors of `parse_select`.
    """
    cls = method if isinstance(method, type) else type(method)
    name = cls.origin or cls.name
    groups = _groups(cls)
    if method is cls:
        groups = (*groups, cls.Settings)
    parser = _select_parser(name, cls, groups)
    if preset:
        parser.set_defaults(preset_of(cls, preset))
    flat = parser.parse_object({key: _plain(value) for key, value in values.items()}).as_dict()
    made = cls(_pick(cls.Settings, flat)) if method is cls else method
    return _job(made, flat, ("selection.select", name))


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


def _groups(method: type[Method]) -> tuple[type, ...]:
    """What every run is told, besides the method's own settings."""
    groups = (PoolSettings, ProxySettings, SelectSettings)
    return (TargetSettings, *groups) if has_targets(method) else groups


def _select_parser(name: str, method: type[Method], groups: tuple[type, ...]) -> Parser:
    of_all = {field.name for group in (*_groups(method), CostSettings) for field in fields(group)}
    of_all |= {"config", "method", "preset", "help"}
    if taken := sorted(of_all & {field.name for field in fields(method.Settings)}):
        raise UsageError(f"method {name}: its settings {', '.join(taken)} are flags of all")
    parser = _parser(f"python -m selection select {name}", method.__doc__, *groups)
    presets = ", ".join(method.presets) or "none for this method"
    parser.add_argument(
        "--preset", type=str | None, help=f"named settings, overridden by flags: {presets}"
    )
    parser.add_argument("--method", default=name, help="the method, for configuration files")
    return parser


def _job(method: Method, flat: Mapping[str, Any], command: tuple[str, ...]) -> Job:
    return Job(
        method=method,
        pool=_pick(PoolSettings, flat),
        proxy=_pick(ProxySettings, flat),
        select=_pick(SelectSettings, flat),
        targets=flat.get("targets"),
        command=command,
    )


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


def _plain(value: Any) -> Any:
    """A Python value as YAML would give it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _pick(group: type[T], flat: Mapping[str, Any]) -> T:
    values = {field.name: flat[field.name] for field in fields(group)}
    return group(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
