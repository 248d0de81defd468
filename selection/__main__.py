"""`python -m selection`, or `robust-selection`: pick the training subset worth using.

list      the methods, what they read, their presets
check     every defect of a pool, before a GPU is used
extract   compute the forward signals of a pool (they are shared by all methods)
select    choose a subset: python -m selection select METHOD --pool ... --budget 0.3
all       every method that can run, signals shared, one comparison
compare   what subsets share: python -m selection compare RUN RUN ... [--out DIR]
verify    check a finished run: hashes, exact subset, versions

Each takes --help. docs/Selection.md explains the run folder and the exit codes, docs/Python.md the
same from Python.
"""

from __future__ import annotations

import sys

from llava.errors import UserError
from llava.flags import run_verb
from llava.launch import process

VERBS = ("list", "check", "extract", "select", "all", "compare", "verify")


def main(argv: list[str] | None = None) -> None:
    """Run one verb; UserError is left to `process`."""
    run_verb(argv, __doc__, {verb: globals()[f"run_{verb}"] for verb in VERBS})


def run_list(argv: list[str]) -> None:
    """One paragraph a method."""
    from selection.cli import parse_plain
    from selection.methods import find_methods

    if argv:
        parse_plain("list", "Show the methods, what they read, their presets.", argv)
    for name, method in find_methods().items():
        summary = (method.__doc__ or "").strip().partition("\n")[0]
        try:
            signals = ", ".join(method().signals()) or "no signal, no model"
        except (TypeError, UserError):  # one from elsewhere, with settings that have no default
            signals = "what its settings say"
        presets = f"; presets: {', '.join(method.presets)}" if method.presets else ""
        origin = "" if method.__module__.startswith("selection.") else f"; from {method.__module__}"
        print(f"{name:18} {summary}\n{'':18} reads {signals}{presets}{origin}")


def run_check(argv: list[str]) -> None:
    """Exit 2 when there is a defect."""
    from selection.check import CheckSettings, check_pool, print_defects, write_report
    from selection.cli import parse_plain
    from selection.pool.pool import Pool
    from selection.settings import PoolSettings

    about = "Check the records, paths, image headers and, with --tokenizer, labels of a pool."
    where, settings = parse_plain("check", about, argv, PoolSettings, CheckSettings)
    pool, tokenizer = Pool.open(where.pool, where.limit, where.images, where.image_roots), None
    if settings.tokenizer:
        from llava.tokens import load_tokenizer

        tokenizer = load_tokenizer(settings.tokenizer)
    defects = check_pool(pool, settings, tokenizer)
    if settings.report:
        write_report(settings.report, defects)
    print_defects(pool, defects)
    if defects:
        sys.exit(2)


def run_extract(argv: list[str]) -> None:
    """Compute what is missing of the forward signals and say where they are."""
    from selection.cli import parse_plain
    from selection.settings import CostSettings, PoolSettings, ProxySettings

    about = "Compute the forward signals of a pool; runs of all methods share them through --store."
    groups = (PoolSettings, ProxySettings, CostSettings)
    where, settings, cost = parse_plain("extract", about, argv, *groups)

    import numpy as np

    from llava import ranks
    from selection.extract.cost import print_cost
    from selection.extract.loop import extract
    from selection.methods.base import Request
    from selection.pool.pool import Pool
    from selection.run import PATIENCE, open_proxy
    from selection.signals.forward import Forward

    ranks.join(PATIENCE)
    pool = Pool.open(where.pool, where.limit)
    rows, proxy = np.arange(len(pool)), open_proxy(settings)
    if cost.dry_run:
        print_cost("forward", Request(Forward(), rows), pool, where, settings, proxy)
        return
    (reader,) = extract([Forward()], proxy, pool, rows, where, settings)
    if ranks.rank() == 0:
        print(f"{len(reader)} samples, {len(reader.bad)} unusable: {reader.folder}")


def run_select(argv: list[str]) -> None:
    """Choose a subset, or print what it would cost."""
    if argv and argv[0] in ("-h", "--help"):
        from selection.methods import find_methods

        names = ", ".join(find_methods())
        print(f"usage: python -m selection select METHOD [flags]\n\nMETHOD: {names}")
        print("or a class of your own: path/to/file.py:Class")
        print("`python -m selection select METHOD --help` shows every flag of a method.")
        return
    from selection.cli import parse_select

    job, dry_run = parse_select(argv)

    from llava import ranks
    from selection.run import Execution

    execution = Execution(job)
    if not dry_run:
        execution.execute()
    elif ranks.rank() == 0:
        execution.print_plan()


def run_all(argv: list[str]) -> None:
    """Choose a subset with every method that can run, and compare them."""
    from selection.cli import parse_plain
    from selection.settings import AllSettings, PoolSettings, ProxySettings, SelectSettings

    about = "Run every method that the given models and files allow, and compare the subsets."
    groups = (PoolSettings, ProxySettings, SelectSettings, AllSettings)
    settings = parse_plain("all", about, argv, *groups)

    from selection.all import select_all

    select_all(*settings)


def run_compare(argv: list[str]) -> None:
    """What the subsets of some runs share, as tables and pictures."""
    from selection.cli import parse_plain
    from selection.settings import CompareSettings

    n_runs = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    about = "What subsets share: python -m selection compare RUN RUN ... [--out DIR]"
    (settings,) = parse_plain("compare", about, argv[n_runs:], CompareSettings)

    from selection.output.compare import compare

    compare(argv[:n_runs], settings.out)


def run_verify(argv: list[str]) -> None:
    """Check a run folder; exit 74 when it is damaged."""
    from selection.cli import parse_plain
    from selection.settings import VerifySettings

    if argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]
    about = "Check a finished run: python -m selection verify DIR"
    (settings,) = parse_plain("verify", about, argv, VerifySettings)

    from selection.output.verify import verify_run

    verify_run(settings.run)


def console() -> None:
    """The command `robust-selection`."""
    process(main)


if __name__ == "__main__":
    process(main)
