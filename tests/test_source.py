"""What no file of the project may contain (P22), read from its syntax tree."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for name in ("llava", "selection", "mini", "benchmarks")
    for path in (ROOT / name).rglob("*.py")
)
BANNED = {
    "eval": "runs code from data",
    "exec": "runs code from data",
    "pickle.load": "runs code from data",
    "pickle.loads": "runs code from data",
    "yaml.load": "runs code from data; yaml.safe_load",
    "yaml.unsafe_load": "runs code from data; yaml.safe_load",
    "os.system": "runs a shell",
}
FORCED = {  # call -> (keyword, value it must have)
    "torch.load": ("weights_only", True),
}
FORBIDDEN = {"shell": True, "allow_pickle": True, "trust_remote_code": True}


def offences(source: str) -> list[str]:
    """One line per call that the rules above forbid."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if name in BANNED:
            found.append(f"line {node.lineno}: {name} {BANNED[name]}")
        if name in FORCED and given.get(FORCED[name][0]) is not FORCED[name][1]:
            found.append(f"line {node.lineno}: {name} without {FORCED[name][0]}=True")
        found += [
            f"line {node.lineno}: {key}={value}"
            for key, value in FORBIDDEN.items()
            if given.get(key) is value
        ]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_dangerous_call(path):
    assert offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load('x')",
        "torch.load('x', weights_only=False)",
        "pickle.load(file)",
        "subprocess.run('ls', shell=True)",
        "np.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_the_rules_see_each_offence(source):
    assert len(offences(source)) == 1


def test_llava_never_imports_selection_nor_selection_mini():
    """Dependencies point one way: mini -> selection -> llava."""
    above = {"llava": {"selection", "mini", "benchmarks"}, "selection": {"mini", "benchmarks"}}
    for package, forbidden in above.items():
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module]
                assert not {name.split(".")[0] for name in names} & forbidden, path
