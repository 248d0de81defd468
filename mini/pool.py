"""Builds the small real world: pool, images, evaluation sets and target tasks in one folder.

Same packages, settings and seed: same bytes. The marker `build.json` is written last; with it in
place a second build has nothing to do, without it everything but downloads and pictures is redone.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files as package_files
from pathlib import Path

from tqdm import tqdm

from llava.errors import DataError
from llava.files import atomic_write, make_folder, remove, storage_errors, sweep
from mini.eval.formats import evaluation_files
from mini.eval.items import EvalSets
from mini.eval.sets import make_evalsets
from mini.fetch import fetch
from mini.jsonfiles import json_list
from mini.packages import PACKAGES
from mini.recipes import drawings, emoji, facts, figures
from mini.render import RASTERISER
from mini.samples import Gallery, Sample
from mini.settings import PoolSettings
from mini.targets import target_files
from mini.world import World, load_world

VERSION = 5  # of what the recipes make; raise it when their output changes
MARKER = "build.json"


@dataclass(frozen=True)
class Source:
    """A recipe and how many samples it is asked for: with all packages, or with PyPI's alone."""

    recipe: Callable[..., list[Sample]]
    n_full: int
    n_pypi: int = 0


SOURCES = (
    Source(emoji.emoji_cap, 2239),
    Source(emoji.emoji_vqa, 1800),
    Source(emoji.emoji_yn, 1500),
    Source(emoji.emoji_mcq, 2200),
    Source(drawings.clipart_cap, 1854),
    Source(drawings.clipart_mcq, 1000),
    Source(drawings.flag_vqa, 194),
    Source(drawings.flag_mcq, 388),
    Source(drawings.country_qa, 150),
    Source(facts.wordnet_mcq, 1200),
    Source(facts.wordnet_yn, 800),
    Source(figures.word_ocr, 900),
    Source(figures.easyvqa, 1785, 2000),
    Source(figures.easyvqa_mcq, 300, 700),
    Source(figures.silhouette, 1300, 1000),
    Source(figures.silhouette_mcq, 300, 800),
    Source(figures.digits_ocr, 1100, 700),
    Source(facts.element_qa, 118, 118),
    Source(facts.element_mcq, 150, 240),
)


def build(out: str | Path, cache: str | Path, seed: int, settings: PoolSettings) -> dict:
    """Make `out` hold the pool of these settings, and return its marker (counts, hashes, absences).

    Does nothing if it is there already. Prints the time of each stage on stderr. Raises `DataError`
    when PyPI cannot be reached, `StorageError` when `out` or `cache` cannot be written.
    """
    out = Path(out)
    identity = {"version": VERSION, "seed": seed, "settings": _plain(settings)}
    identity["rasteriser"] = RASTERISER
    identity["packages"] = {package.key: package.sha256[:16] for package in PACKAGES}
    if marker := already_built(out, identity):
        return marker
    clock = _Clock()
    sources = fetch(cache, settings.registries)
    for line in sources.report():
        print(f"mini: {line}", file=sys.stderr)
    clock.stage("download")
    world = load_world(sources)
    clock.stage("pictures")
    sets = make_evalsets(world)
    clock.stage("evaluation")
    samples, gallery = make_samples(world, sets, seed, settings)
    targets = target_files(world, sets, gallery)
    clock.stage("samples")
    pool = json_list(samples)
    _clear(out)
    evaluation = evaluation_files(sets)
    write_files(out / "images", dict(sorted(gallery.items())))
    write_files(out / "eval", evaluation)
    write_files(out / "targets", targets)
    atomic_write(out / "ATTRIBUTION.md", attribution())
    atomic_write(out / "pool.json", pool)
    marker = {
        "identity": identity,
        "absent": sources.report(),
        "samples": dict(sorted(Counter(s["meta"]["source"] for s in samples).items())),
        "pool_size": len(pool),
        "pool_sha256": hashlib.sha256(pool).hexdigest(),
        "images": _tally(out / "images"),
        "files": {name: len(content) for name, content in evaluation.items()},
        "targets": {name: len(content) for name, content in targets.items()},
    }
    sweep(out)
    atomic_write(out / MARKER, json.dumps(marker, indent=1).encode())
    clock.stage("write")
    return marker


def already_built(out: Path, identity: dict) -> dict | None:
    """The marker of a build of this identity in `out`, if no file is lost, cut or changed in size.

    What others add below eval/ (answers of models) does not matter.
    """
    try:
        marker = json.loads((out / MARKER).read_bytes())
        if marker["identity"] != identity or marker["images"] != _tally(out / "images"):
            return None
        sizes = {out / "eval" / name: size for name, size in marker["files"].items()}
        sizes |= {out / "targets" / name: size for name, size in marker["targets"].items()}
        sizes[out / "pool.json"] = marker["pool_size"]
        return marker if all(path.stat().st_size == n for path, n in sizes.items()) else None
    except (OSError, ValueError, KeyError):
        return None  # no marker, or a file is gone: build


def make_samples(
    world: World, sets: EvalSets, seed: int, settings: PoolSettings
) -> tuple[list[dict], Gallery]:
    """The records of the pool in random order, and their pictures.

    Raises `DataError` if a picture of the evaluation sets is among them (equal pixels).
    """
    gallery = Gallery()
    full = bool(world.concepts.emoji or world.clipart.get("train"))
    samples: list[Sample] = []
    bar = tqdm(SOURCES, desc="samples", unit="source", disable=not sys.stderr.isatty())
    for source in bar:
        n = round((source.n_full if full else source.n_pypi) * settings.scale)
        rng = random.Random(f"{seed}/{source.recipe.__name__}")
        samples += source.recipe(world, gallery, n, rng, settings)
    samples += _copies(samples, random.Random(f"{seed}/copies"), settings)
    numbers: Counter = Counter()
    records = []
    for sample in samples:
        records.append(sample.record(numbers[sample.source]))
        numbers[sample.source] += 1
    random.Random(f"{seed}/order").shuffle(records)
    if shared := set(gallery.values()) & sets.pictures():
        names = sorted(name for name, picture in gallery.items() if picture in shared)
        raise DataError(f"images/{names[0]}: also in the evaluation sets ({len(names)} such)")
    return records, gallery


def attribution() -> bytes:
    """Authors and licences of everything the small world is made of."""
    return (package_files("mini") / "ATTRIBUTION.md").read_bytes()


def _copies(samples: Sequence[Sample], rng: random.Random, settings: PoolSettings) -> list[Sample]:
    """Exact repetitions, half of emoji captions and half of easy-VQA (all of it without emoji)."""
    n = round(settings.duplicates * min(1.0, settings.scale))
    captions = [sample for sample in samples if sample.source == "emoji_cap"]
    shapes = [sample for sample in samples if sample.source == "easyvqa"]
    n_captions = min(n // 2, len(captions))
    chosen = rng.sample(captions, n_captions)
    chosen += rng.sample(shapes, min(n - n_captions, len(shapes)))
    return [replace(sample, dup=1) for sample in chosen]


def _clear(out: Path) -> None:
    """Remove what an earlier build of other settings left, the marker first."""
    make_folder(out)
    remove(out / MARKER)
    for name in ("images", "eval", "targets"):
        with storage_errors(out / name):
            if (out / name).exists():
                shutil.rmtree(out / name)


def write_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Plain writes: fifteen thousand syncs would take minutes, the marker's tally guards them."""
    with storage_errors(folder):
        for parent in sorted({(folder / name).parent for name in contents}):
            os.makedirs(parent, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)


def _tally(folder: Path) -> list[int]:
    """Number and total size of the files below `folder` (30 ms)."""
    count = size = 0
    folders = [str(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    count += 1
                    size += entry.stat().st_size
    return [count, size]


def _plain(settings: PoolSettings) -> dict:
    return {**asdict(settings), "registries": sorted(settings.registries)}


class _Clock:
    """Prints how long each stage took."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        print(f"mini: {name} {now - self._last:.1f} s", file=sys.stderr)
        self._last = now
