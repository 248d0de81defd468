"""Pictures and facts, loaded once and already divided into what trains and what evaluates."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image

from mini.clipart import ClipArt, load_clipart
from mini.concepts import Concepts, Emoji, load_concepts, rank
from mini.fetch import Sources, load_arrays
from mini.render import rasterise

ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
SHAPES = {"train": range(1500), "evaluation": range(400), "target": range(400, 500)}
"""easy-VQA pictures used of its train part, for the others of its test part; ten questions each"""
N_TARGETS = 320  # 3D drawings of training concepts, which training does not show, for target tasks
_HELD_OUT = 0.2  # share of silhouettes and digits that only evaluation sees
_ANIMAL_FILES = "animal_mnist/data/Animal_MNIST/animal_{}_version_3.gz"
_SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '


@dataclass
class World:
    """What the packages at hand provide; a part whose package is absent is empty.

    `emoji[hexcode, style]`, `flags[code]` (flat, for training) and `waving[code]` (3D, for
    evaluation) are PNG bytes. `clipart`, `shapes`, `animals` and `digits` are keyed by the split,
    "train" or "evaluation" (of `shapes` also "target"): no picture is in two.
    """

    concepts: Concepts
    emoji: dict[tuple[str, str], bytes] = field(default_factory=dict)
    flags: dict[str, bytes] = field(default_factory=dict)
    waving: dict[str, bytes] = field(default_factory=dict)
    clipart: dict[str, list[tuple[ClipArt, bytes]]] = field(default_factory=dict)
    shapes: dict[str, Shapes] = field(default_factory=dict)
    animals: dict[str, list[list[Image.Image]]] = field(default_factory=dict)
    digits: dict[str, list[list[Image.Image]]] = field(default_factory=dict)


@dataclass
class Shapes:
    """Part of easy-VQA: `questions` are (text, answer, picture number)."""

    questions: list[tuple[str, str, int]]
    pictures: dict[int, bytes]


def load_world(sources: Sources, cache: str | Path | None = None) -> World:
    """Read concepts and rasterise the drawings that the pool or the evaluation sets use.

    The first call takes about a minute on two cores, later ones a few seconds (picture cache).
    """
    world = World(load_concepts(sources))
    clipart = load_clipart(sources) if sources.has("clipart") else []
    shapes = {split: _shape_files(sources, split) for split in SHAPES}
    drawings = _emoji_drawings(sources, world.concepts) | _flag_drawings(sources, world.concepts)
    for split, (_, files) in shapes.items():
        drawings |= {f"shapes/{split}/{number}": raw for number, raw in files.items()}
    cache = cache or sources.cache
    drawn = rasterise(drawings, cache)
    drawn |= rasterise({f"clipart/{art.path}": art.svg for art in clipart}, cache, trim=True)
    pictures = {name: picture for name, picture in drawn.items() if picture is not None}
    _place_emoji(world, pictures)
    world.clipart = _divide_clipart(clipart, pictures)
    for split, (questions, files) in shapes.items():
        shown = {number: pictures[f"shapes/{split}/{number}"] for number in files}
        world.shapes[split] = Shapes(questions, shown)
    world.animals = _animals(sources)
    world.digits = _digits()
    return world


def _emoji_drawings(sources: Sources, concepts: Concepts) -> dict[str, bytes]:
    """Training styles of every emoji, and the 3D style of those that others ask about."""
    if not concepts.emoji:
        return {}
    drawings, wanted, targets = {}, {}, target_emoji(concepts)
    for emoji in concepts.emoji:
        if emoji.role != "train" or emoji in targets:
            wanted[emoji.icons["3d"]] = f"emoji/{emoji.hexcode}/3d"
    for style in ("noto", "flat"):
        (raw,) = sources.read(style, "package/icons.json")
        icons = json.loads(raw)
        for emoji in concepts.emoji:
            if style in emoji.training_styles:
                icon = icons["icons"][emoji.icons[style]]
                box = f"{icon.get('width', icons['width'])} {icon.get('height', icons['height'])}"
                svg = f'{_SVG}viewBox="0 0 {box}">{icon["body"]}</svg>'
                drawings[f"emoji/{emoji.hexcode}/{style}"] = svg.encode()
    found = dict(sources.members("3d", wanted.__contains__))
    return drawings | {wanted[name]: raw for name, raw in found.items()}


def target_emoji(concepts: Concepts) -> list[Emoji]:
    """Training concepts whose 3D drawing is for the target tasks, in a fixed random order."""
    drawn = [e for e in concepts.emoji if e.role == "train" and "3d" in e.icons]
    return sorted(drawn, key=lambda emoji: rank(f"target {emoji.hexcode}"))[:N_TARGETS]


def _flag_drawings(sources: Sources, concepts: Concepts) -> dict[str, bytes]:
    """Flat flags, and waving ones where the 3D emoji are there too."""
    codes = [country.code for country in concepts.countries]
    wanted = {f"package/png250px/{code}.png": f"flags/{code}" for code in codes}
    drawings = {
        wanted[name]: raw
        for name, raw in (sources.members("flags", wanted.__contains__) if wanted else ())
    }
    if sources.has("3d"):
        letters = {code: "-".join(f"{0x1F1E6 + ord(c) - 97:x}" for c in code) for code in codes}
        waving = {f"package/assets/{hexes}.webp": f"waving/{c}" for c, hexes in letters.items()}
        drawings |= {waving[n]: raw for n, raw in sources.members("3d", waving.__contains__)}
    return drawings


def _place_emoji(world: World, pictures: dict[str, bytes]) -> None:
    for name, picture in pictures.items():
        kind, *rest = name.split("/")
        if kind == "emoji":
            world.emoji[rest[0], rest[1]] = picture
        elif kind in ("flags", "waving"):
            getattr(world, kind)[rest[0]] = picture


def _divide_clipart(
    clipart: list[ClipArt], pictures: dict[str, bytes]
) -> dict[str, list[tuple[ClipArt, bytes]]]:
    """One drawing for each set of equal pixels: many are filed twice, across folders and splits."""
    drawn = [(a, pictures[f"clipart/{a.path}"]) for a in clipart if f"clipart/{a.path}" in pictures]
    seen: set[bytes] = set()
    split: dict[str, list[tuple[ClipArt, bytes]]] = {"evaluation": [], "train": []}
    for name, kept in split.items():  # evaluation first: its pictures leave training
        for art, picture in drawn:
            if art.evaluation == (name == "evaluation") and picture not in seen:
                seen.add(picture)
                kept.append((art, picture))
    return split


def _shape_files(
    sources: Sources, split: str
) -> tuple[list[tuple[str, str, int]], dict[int, bytes]]:
    """The pictures of a split, with their questions."""
    folder = f"easy_vqa/data/{'train' if split == 'train' else 'test'}"
    names = {f"{folder}/images/{number}.png": number for number in SHAPES[split]}
    (raw,) = sources.read("easyvqa", f"{folder}/questions.json")
    files = {names[n]: png for n, png in sources.members("easyvqa", names.__contains__)}
    questions = [(text, answer, n) for text, answer, n in json.loads(raw) if n in files]
    return questions, files


def _animals(sources: Sources) -> dict[str, list[list[Image.Image]]]:
    """Black silhouettes on white, a list for each of `ANIMALS`; equal ones share their split."""
    data, labels = (
        load_arrays(raw)
        for raw in sources.read("animals", *(_ANIMAL_FILES.format(n) for n in ("data", "label")))
    )
    return _by_split(255 - data, labels)


def _digits() -> dict[str, list[list[Image.Image]]]:
    """scikit-learn's handwritten digits, black on white, a list for each digit.

    Read from its data file: importing the library takes longer than all of this.
    """
    folder = Path(find_spec("sklearn").submodule_search_locations[0])
    table = np.loadtxt(folder / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images = table[:, :-1].reshape(-1, 8, 8)
    return _by_split((255 - images * (255 / 16)).astype(np.uint8), table[:, -1].astype(int))


def _by_split(data: np.ndarray, labels: np.ndarray) -> dict[str, list[list[Image.Image]]]:
    """Images (N, H, W) uint8 by split and label; the split follows from the pixels."""
    groups = {s: [[] for _ in range(int(labels.max()) + 1)] for s in ("train", "evaluation")}
    for pixels, label in zip(data, labels, strict=True):
        held_out = xxhash.xxh3_64_intdigest(pixels.tobytes()) / 2**64 < _HELD_OUT
        groups["evaluation" if held_out else "train"][label].append(Image.fromarray(pixels))
    return groups
