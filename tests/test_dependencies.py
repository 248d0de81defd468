"""Declared and used dependencies agree: what is imported is declared, and the other way round."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"llava", "selection", "mini", "benchmarks", "tests"}
# Imported where they are asked for, with a line that names them where they are absent.
ON_DEMAND = {"open_clip", "flash_attn"}
# Declared, imported by what we import: sentencepiece's reader of its files, and chat templates.
INDIRECT = {"protobuf", "jinja2"}
LOOKED_FOR = {"find_spec", "import_module", "Lazy"}


def canonical(requirement: str) -> str:
    """The name of a distribution, as in `PyYAML>=6`, in one spelling."""
    return re.split(r"[\[<>=!~ ;]", requirement)[0].lower().replace("_", "-")


def declared(*extras: str) -> set[str]:
    """Distributions of the core and of some extras."""
    listed = PROJECT["dependencies"] + [
        requirement for extra in extras for requirement in PROJECT["optional-dependencies"][extra]
    ]
    return {canonical(requirement) for requirement in listed}


def imported(*folders: str) -> set[str]:
    """Distributions whose modules the Python files of some folders import or look for."""
    modules: set[str] = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in LOOKED_FOR:
                modules |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    names = {module.partition(".")[0] for module in modules}
    names -= {*sys.stdlib_module_names, *OURS, *ON_DEMAND}
    known = packages_distributions()
    return {canonical(known.get(name, [name])[0]) for name in names}


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (("llava", "selection"), ("train", "quantized", "judge")),
        (("mini",), ("mini",)),
    ],
)
def test_what_is_imported_is_declared(folders, extras):
    assert imported(*folders) <= declared(*extras)


def test_tests_import_what_setup_installs_for_them():
    beside = imported("tests") - {path.stem for path in (ROOT / "tests").rglob("*.py")}
    assert beside <= declared("dev", "train", "judge", "mini")


def test_what_is_declared_is_imported():
    assert declared() <= imported("llava", "selection") | INDIRECT
    for extra in ("train", "quantized", "judge"):
        assert declared(extra) - declared() <= imported("llava", "selection")
    assert declared("mini") - declared() <= imported("mini")


def test_what_is_declared_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonical(line) for line in lines if not line.startswith("#")}
    assert declared(*PROJECT["optional-dependencies"]) <= pinned
