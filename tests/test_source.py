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


# Functions that are a program's way in or out; `if __name__ == "__main__"` is one everywhere.
ENDS = {
    ("llava/flags.py", "run_verb"),
    ("llava/launch.py", "_spoken"),
    ("llava/launch.py", "_end"),
    ("llava/show.py", "main"),
    ("llava/train/plan/plan.py", "take"),
    ("selection/methods/coido/cotrain.py", "main"),
}
PARSING = {"parse_args", "parse_known_args", "parse_args_into_dataclasses"}
OF_PROGRAMS = {"sys.exit", "sys.argv", "exit", "quit", "SystemExit"}


def programs(tree: ast.Module) -> list[tuple[str, int]]:
    """The outermost function and the line of whatever only a program may do: end the interpreter,
    or read the command line. Naming SystemExit to catch it is no end."""
    caught = {
        id(name)
        for handler in ast.walk(tree)
        if isinstance(handler, ast.ExceptHandler) and handler.type is not None
        for name in ast.walk(handler.type)
    }

    def is_of_programs(node: ast.AST) -> bool:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            parses = node.func.attr in PARSING  # without words it reads the command line's
            return parses and not (node.args or node.keywords)
        named = isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in OF_PROGRAMS
        return named and id(node) not in caught

    return [
        (getattr(top, "name", ""), node.lineno)
        for top in tree.body
        if not (isinstance(top, ast.If) and ast.unparse(top.test) == "__name__ == '__main__'")
        for node in ast.walk(top)
        if is_of_programs(node)
    ]


def test_only_programs_end_the_interpreter_or_read_the_command_line():
    used = set()
    for package in ("llava", "selection"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name == "__main__.py":
                continue
            where = path.relative_to(ROOT).as_posix()
            used |= {(where, top) for top, _ in programs(ast.parse(path.read_text("utf-8")))}
    assert used == ENDS


@pytest.mark.parametrize(
    ("source", "n"),
    [
        ("def f():\n    sys.exit(2)", 1),
        ("def f(argv=sys.argv): ...", 1),
        ("def f():\n    raise SystemExit(1)", 1),
        ("def f():\n    return parser().parse_args()", 1),
        ("def f(argv):\n    return parser().parse_args(argv)", 0),
        ("def f():\n    try:\n        g()\n    except SystemExit:\n        pass", 0),
        ("if __name__ == '__main__':\n    sys.exit(main(sys.argv))", 0),
    ],
)
def test_that_rule_sees_each_way(source, n):
    assert len(programs(ast.parse(source))) == n


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
