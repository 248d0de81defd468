"""A command line whose mistakes are told in one line, with the nearest right flag."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from llava.errors import UsageError

set_parsing_settings(docstring_parse_attribute_docstrings=True)

_VALUE = re.compile(r'Parser key "(\S+)":\s*Expected an? (.+?)\. Got value: (.*)', re.DOTALL)
_CLASS = re.compile(r"<class '(\w+)'>|typing\.")
_TYPES = {"tuple": "a list such as '[a,b]'"}
_OPTION = re.compile(r"Option '(\w+)' is not accepted")
_UNKNOWN = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)
_MISSING = "the following arguments are required: "


class Parser(ArgumentParser):
    """jsonargparse's parser, but a mistake raises UsageError instead of printing every flag."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(f"{self._told(message)}; {self.prog} --help explains all flags") from ex

    def _told(self, message: str) -> str:
        if found := _VALUE.search(message):
            name, expected, value = found.groups()
            expected = _CLASS.sub(r"\1", expected).replace("Literal[", "one of [")
            expected = _TYPES.get(expected, expected)
            return f"--{name} {' '.join(value.split())}: expected {expected}"
        if found := _OPTION.search(message):
            return self._no_flag(f"--{found[1]}")
        if found := _UNKNOWN.search(message):
            words = found[1].split()
            flags = [word.partition("=")[0] for word in words if word.startswith("--")]
            return "; ".join(map(self._no_flag, flags)) or f"{' '.join(words)}: belongs to no flag"
        if message.startswith(_MISSING):
            names = message.removeprefix(_MISSING).split(", ")
            return f"{', '.join(f'--{name}' for name in names)} is missing"
        return " ".join(message.split())

    def _no_flag(self, flag: str) -> str:
        known = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(flag, known, n=1)
        return f"{flag}: no such flag{f' (did you mean {near[0]}?)' if near else ''}"


def read_flags(prog: str, about: str, argv: list[str], *groups: type) -> list:
    """`argv` as filled settings, one instance of each dataclass of `groups`.

    Raises UsageError for a flag that does not exist and for a value that cannot be.
    """
    parser = Parser(prog=prog, description=about)
    for group in groups:
        parser.add_class_arguments(group, as_group=True)
    flat = parser.parse_args(normalised(argv, groups)).as_dict()
    return [_filled(group, flat) for group in groups]


def _filled(group: type, flat: dict) -> Any:
    values = {field.name: flat[field.name] for field in dataclasses.fields(group)}
    return group(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def normalised(argv: list[str], groups: tuple[type, ...]) -> list[str]:
    """Let `--dry-run` stand for `--dry_run true`: flags with hyphens, switches without a value."""
    switches = {
        field.name
        for group in groups
        for field in dataclasses.fields(group)
        if field.type in (bool, "bool")
    }
    out = []
    for position, argument in enumerate(argv):
        if argument.startswith("--"):
            flag, equals, value = argument.partition("=")
            argument = "--" + flag[2:].replace("-", "_") + equals + value
            bare = position + 1 == len(argv) or argv[position + 1].startswith("--")
            if flag[2:].replace("-", "_") in switches and not equals and bare:
                argument += "=true"
        out.append(argument)
    return out


def flag_values(argv: Sequence[str]) -> dict[str, str]:
    """Flags in `argv` with their values as text, for those who only look whether one is given.

    The last of a kind counts; `--a-b`, `--a_b` and `--a-b=value` are one flag, several values are
    joined by a space, and a flag without one is "true".
    """
    values: dict[str, list[str]] = {}
    name = None
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            name = flag.replace("-", "_")
            values[name] = [value] if equals else []
        elif name is not None:
            values[name].append(word)
    return {name: " ".join(words) if words else "true" for name, words in values.items()}


def run_verb(argv: list[str] | None, about: str, verbs: Mapping[str, Callable]) -> Any:
    """Hand `argv` (None: the command line's) to the verb it begins with; without one, say `about`.

    Returns what the verb returns. Raises UsageError for another word.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(about.strip())
        return None
    verb, *rest = argv
    if verb not in verbs:
        raise UsageError(f"{verb!r} is not a verb; choose one of {', '.join(verbs)}")
    return verbs[verb](rest)
