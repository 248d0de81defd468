"""A small pool on disk with made-up signals in real stores, for tests of every method."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from selection.methods.base import Context, Task
from selection.pool.pool import Pool
from selection.store.key import Column, StoreKey
from selection.store.store import StoreReader, StoreWriter

H = 12  # hidden size
LETTER = "Answer with the option's letter from the given choices directly."
WORDINGS = {
    "phrase": "What is it?\nAnswer the question using a single word or phrase.",
    "choice": f"Which?\nA. a\nB. b\n{LETTER}",
    "caption": "Provide a one-sentence caption for the provided image.",
    "plain_text": "Tell me a story.",
}


@dataclass
class World:
    """Pool and signals; `forward` and `perturbed` hold arrays (N, ...) by pool row, `others` those
    of further signals by their names; `targets` those of the target tasks by sub-task."""

    folder: Path
    pool: Pool
    formats: np.ndarray
    forward: dict[str, np.ndarray]
    perturbed: dict[str, np.ndarray]
    others: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    bad: list[int] = field(default_factory=list)
    requested: list[np.ndarray] = field(default_factory=list)
    targets: dict[str, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)

    def store(
        self, name: str, arrays: dict, rows: np.ndarray, block_size: int, task: str = ""
    ) -> StoreReader:
        columns = [Column(key, a.shape[1:], a.dtype.name) for key, a in arrays.items()]
        identity = {"made for": f"tests {task}", "block_size": block_size}
        key = StoreKey(name, identity, rows, columns)
        writer = StoreWriter.open(self.folder, key, block_size)
        for i in writer.missing_blocks():
            mine = writer.block_rows(i)
            bad = [{"row": int(r), "uid": "", "reason": "made up"} for r in mine if r in self.bad]
            blank = np.isin(mine, self.bad)
            writer.write_block(i, {k: _blanked(a[mine], blank) for k, a in arrays.items()}, bad)
        writer.finish()
        return StoreReader.open(writer.folder)

    def context(self, block_size: int = 16) -> Context:
        rows = np.arange(len(self.pool))
        signals = {"forward": self.forward, **self.others}
        return Context(
            self.pool,
            {name: self.store(name, arrays, rows, block_size) for name, arrays in signals.items()},
            tasks=self.tasks(block_size),
            k=45,
        )

    def tasks(self, block_size: int) -> tuple[Task, ...]:
        """Tasks a and b, whose sub-tasks are a, b/1 and b/2."""
        readers = {
            subtask: {
                name: self.store(name, arrays, np.arange(12), block_size, subtask)
                for name, arrays in signals.items()
            }
            for subtask, signals in self.targets.items()
        }
        names = {"a": ("a",), "b": ("b/1", "b/2")}
        return tuple(
            Task(task, 1.0, mine, {n: tuple(readers[s][n] for s in mine) for n in readers["a"]})
            for task, mine in names.items()
        )

    def run(self, method, seed: int = 0, block_size: int = 16):
        """`Method.run` with stores of `block_size`; the rows it asks for go to `requested`."""

        def extract(requests):
            ((name, request),) = requests.items()
            self.requested.append(request.rows)
            arrays = {"perturbed": self.perturbed, "forward": self.forward}[name]
            return {name: self.store(name, arrays, request.rows, block_size)}

        return method.run(self.context(block_size), seed, extract)

    def reordered(self, folder: Path, order: np.ndarray) -> World:
        """The same samples with the same signals in another order."""
        raws = [self.pool.raw(int(row)) for row in order]
        folder.mkdir()
        (folder / "pool.json").write_bytes(b"[" + b",".join(raws) + b"]")
        return World(
            folder,
            Pool.open(folder / "pool.json"),
            self.formats[order],
            {key: a[order] for key, a in self.forward.items()},
            {key: a[order] for key, a in self.perturbed.items()},
            {
                name: {key: a[order] for key, a in arrays.items()}
                for name, arrays in self.others.items()
            },
            [int(np.flatnonzero(order == row)[0]) for row in self.bad],
            targets=self.targets,
        )


def _blanked(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A copy with NaN, or 0, in `rows` (n,) bool: what is stored of a sample without numbers."""
    array = array.copy()
    array[rows] = np.nan if np.issubdtype(array.dtype, np.floating) else 0
    return array


def make_world(folder: Path, n: int = 150, seed: int = 0, formats=tuple(WORDINGS)) -> World:
    """`n` samples over `formats` and three sources; vectors lie around one direction per format."""
    rng = np.random.default_rng(seed)
    kinds = np.array(formats)[rng.integers(len(formats), size=n)]
    records = []
    for i, kind in enumerate(kinds):
        turns = [("human", WORDINGS[kind]), ("gpt", f"answer {i}")]
        record = {"id": i, "source": f"source{i % 7 % 3}"}
        if kind != "plain_text":
            record["image"] = f"{i}.png"
        record["conversations"] = [{"from": role, "value": text} for role, text in turns]
        records.append(record)
    (folder / "pool.json").write_text(json.dumps(records))
    centre = rng.normal(size=(len(formats), H))[[list(formats).index(kind) for kind in kinds]]
    vectors = {
        name: (centre + rng.normal(size=(n, H))).astype(np.float16)
        for name in ("last_state", "attention_state", "mean_state")
    }
    is_choice, no_attack = kinds == "choice", kinds == "plain_text"
    attack = {
        "kind": np.where(is_choice, 1, np.where(no_attack, 0, 2)).astype(np.int32),
        "gap": np.where(no_attack, np.nan, rng.exponential(size=n)).astype(np.float32),
        "n_failed": np.where(is_choice, rng.integers(0, 3, n), 0).astype(np.int32),
        "loss_perturbed": np.where(no_attack, np.nan, rng.exponential(size=n)).astype(np.float32),
        "last_state": rng.normal(size=(n, H)).astype(np.float16),
        "attention_state": rng.normal(size=(n, H)).astype(np.float16),
    }
    scalars = {
        "nll_mean": rng.exponential(size=n).astype(np.float32),
        "nll_sum": rng.exponential(8.0, size=n).astype(np.float32),
    }
    pool = Pool.open(folder / "pool.json")
    more, others = make_more(np.random.default_rng([seed, 1]), centre, ~no_attack)
    gradients = make_gradients(np.random.default_rng([seed, 2]), centre)
    others |= dict.fromkeys(("gradients", "gradients_1", "noise_gradients"), gradients)
    targets = {
        name: make_target(np.random.default_rng([seed, 3, i]), centre[i])
        for i, name in enumerate(("a", "b/1", "b/2"))
    }
    return World(
        folder, pool, kinds, {**vectors, **scalars, **more}, attack, others, targets=targets
    )


def make_gradients(rng: np.random.Generator, centre: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of the gradients of samples that lie around `centre` (n, H)."""
    vectors = np.tile(centre, 2) + rng.normal(size=(len(centre), 2 * H))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    norm = rng.exponential(size=len(centre)).astype(np.float32)
    return {"gradient": unit.astype(np.float16), "norm": norm}


def make_target(rng: np.random.Generator, centre: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Signals of twelve samples of a sub-task, which lie around `centre` (H,)."""
    centres = np.tile(centre, (12, 1))
    states = (centres + rng.normal(size=(12, H))).astype(np.float16)
    gradients = make_gradients(rng, centres)
    return {"forward": {"last_state": states}, "gradients": gradients, "gradients_1": gradients}


def make_more(
    rng: np.random.Generator, centre: np.ndarray, has_image: np.ndarray
) -> tuple[dict, dict]:
    """Further columns of the forward signals, and further signals; `centre` (N, H)."""
    n = len(centre)
    forward = {
        "el2n": rng.uniform(0, 1.4, n).astype(np.float32),
        "aum": rng.uniform(-1, 1, n).astype(np.float32),
        "n_tokens": rng.integers(1, 400, n).astype(np.int32),
    }

    def around(width: int) -> np.ndarray:
        vectors = np.tile(centre, width // H) + rng.normal(size=(n, width))
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)

    clip = {
        "image_features": around(H),
        "text_features": around(H),
        "clip_score": rng.uniform(-0.1, 0.4, n).astype(np.float32),
    }
    clip["image_features"][~has_image] = 0
    clip["clip_score"][~has_image] = np.nan
    others = {
        "blocks": {"vision": around(2 * H), "language": around(2 * H)},
        "clip": clip,
        "holdout": {"nll_mean": rng.exponential(size=n).astype(np.float32)},
    }
    return forward, others


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


@pytest.fixture
def new_world(tmp_path: Path):
    """Maker of further worlds, each in a folder of its own."""

    def make(name: str, **choices) -> World:
        folder = tmp_path / name
        folder.mkdir()
        return make_world(folder, **choices)

    return make
