"""`python -m selection`: pick the training subset worth using.

list      the methods, what they read, their presets
check     every defect of a pool, before a GPU is used
extract   compute the forward signals of a pool (they are shared by all methods)
select    choose a subset: python -m selection select METHOD --pool ... --budget 0.3
all       every method that can run, signals shared, one comparison
compare   what subsets share: python -m selection compare RUN RUN ... [--out DIR]
verify    check a finished run: hashes, exact subset, versions

Each takes --help. docs/Selection.md explains the run folder and the exit codes.
"""

from __future__ import annotations

import os
import sys

import numpy as np

from llava.errors import run_main
from llava.flags import run_verb

VERBS = ("list", "check", "extract", "select", "all", "compare", "verify")


def main(argv: list[str] | None = None) -> None:
    """Run one verb; UserError is left to `run_main`."""
    run_verb(argv, __doc__, {verb: globals()[f"run_{verb}"] for verb in VERBS})


def run_list(argv: list[str]) -> None:
    """One paragraph a method."""
    from selection.methods import find_methods
    from selection.settings import parse_plain

    parse_plain("list", "Show the methods, what they read, their presets.", argv)
    for name, method in find_methods().items():
        summary = (method.__doc__ or "").strip().splitlines()[0]
        signals = ", ".join(method().signals()) or "no signal, no model"
        presets = f"; presets: {', '.join(method.presets)}" if method.presets else ""
        print(f"{name:18} {summary}\n{'':18} reads {signals}{presets}")


def run_check(argv: list[str]) -> None:
    """Exit 2 when there is a defect."""
    from llava.tokens import load_tokenizer
    from selection.check import CheckSettings, check_pool, print_defects, write_report
    from selection.pool.pool import Pool
    from selection.settings import PoolSettings, parse_plain

    about = "Check the records, paths, image headers and, with --tokenizer, labels of a pool."
    (where, settings), _ = parse_plain("check", about, argv, PoolSettings, CheckSettings)
    pool = Pool.open(where.pool, where.limit)
    tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
    defects = check_pool(pool, where, settings, tokenizer)
    if settings.report:
        write_report(settings.report, defects)
    print_defects(pool, defects)
    if defects:
        sys.exit(2)


def run_extract(argv: list[str]) -> None:
    """Compute what is missing of the forward signals and say where they are."""
    from selection.methods.base import Request
    from selection.pool.pool import Pool
    from selection.ranks import Ranks
    from selection.run import extract_signal, open_proxy, print_cost
    from selection.settings import PlanSettings, PoolSettings, ProxySettings, parse_plain
    from selection.signals.forward import Forward

    about = "Compute the forward signals of a pool; runs of all methods share them through --store."
    groups = (PoolSettings, ProxySettings, PlanSettings)
    (where, proxy, planning), _ = parse_plain("extract", about, argv, *groups)
    pool = Pool.open(where.pool, where.limit)
    rows = np.arange(len(pool))
    if planning.dry_run:
        request = Request(Forward(), rows)
        print_cost("forward", request, pool, where, proxy, open_proxy(proxy))
        return
    ranks = Ranks()
    reader = extract_signal(Forward(), rows, pool, where, proxy, ranks)
    if ranks.rank == 0:
        print(f"{len(reader)} samples, {len(reader.bad)} unusable: {reader.folder}")


def run_select(argv: list[str]) -> None:
    """Choose a subset, or print the plan for it."""
    if argv and argv[0] in ("-h", "--help"):
        from selection.methods import find_methods

        names = ", ".join(find_methods())
        print(f"usage: python -m selection select METHOD [flags]\n\nMETHOD: {names}")
        print("`python -m selection select METHOD --help` shows every flag of a method.")
        return
    from selection.ranks import Ranks
    from selection.run import Selection
    from selection.settings import parse_select

    run = parse_select(argv)
    selection = Selection(run, Ranks())
    if run.dry_run:
        if selection.ranks.rank == 0:
            selection.print_plan()
        return
    selection.execute()


def run_all(argv: list[str]) -> None:
    """Choose a subset with every method that can run, and compare them."""
    from selection.all import AllSettings, select_all
    from selection.settings import PoolSettings, ProxySettings, SelectSettings, parse_plain

    about = "Run every method that the given models and files allow, and compare the subsets."
    groups = (PoolSettings, ProxySettings, SelectSettings, AllSettings)
    settings, _ = parse_plain("all", about, argv, *groups)
    select_all(*settings)


def run_compare(argv: list[str]) -> None:
    """What the subsets of some runs share, as tables and pictures."""
    from selection.output.compare import CompareSettings, compare
    from selection.settings import parse_plain

    n_runs = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    about = "What subsets share: python -m selection compare RUN RUN ... [--out DIR]"
    (settings,), _ = parse_plain("compare", about, argv[n_runs:], CompareSettings)
    compare(argv[:n_runs], settings.out)


def run_verify(argv: list[str]) -> None:
    """Check a run folder; exit 74 when it is damaged."""
    from selection.output.verify import verify_run
    from selection.settings import VerifySettings, parse_plain

    if argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]
    (settings,), _ = parse_plain(
        "verify", "Check a finished run: python -m selection verify DIR", argv, VerifySettings
    )
    verify_run(settings.run)


def _process() -> None:
    """`main` as a process of its own, perhaps one of those that torchrun has started."""
    main()
    if "WORLD_SIZE" in os.environ:
        from llava.ranks import leave

        leave()


if __name__ == "__main__":
    run_main(_process)
