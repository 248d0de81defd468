"""A small pool on disk with made-up signals in real stores: what the contract holds methods to.

Signals of the project's kinds have numbers like real ones (vectors around a direction a format, NaN
where a sample has no picture or no perturbation); any other is drawn by what it says of its
columns. No model runs.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from llava.files import atomic_write
from selection.methods.base import Context, Method, Request, Scored, Task
from selection.pool.pool import Pool
from selection.store.key import Column, StoreKey
from selection.store.store import StoreReader, StoreWriter

K = 45  # samples that are chosen
H = 12  # hidden size
N_OF_TARGET = 12
LETTER = "Answer with the option's letter from the given choices directly."
WORDINGS = {
    "phrase": "What is it?\nAnswer the question using a single word or phrase.",
    "choice": f"Which?\nA. a\nB. b\n{LETTER}",
    "caption": "Provide a one-sentence caption for the provided image.",
    "plain_text": "Tell me a story.",
}
SCORER = SimpleNamespace(
    hidden_size=H, width=H, stored_dtype="float16", decoder=SimpleNamespace(layers=range(4))
)
"""What signals ask of a model to tell their columns."""
SCORER.clip = SCORER


@dataclass
class World:
    """Pool and signals; `forward` and `perturbed` hold arrays (N, ...) by pool row, `others` those
    of further signals by their names; `targets` those of the target tasks by sub-task. `requested`
    are the rows (n,) of every request of a second stage.
    """

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
        """A finished store of `arrays` for pool `rows` (n,); those in `bad` have no numbers."""
        columns = [Column(key, a.shape[1:], a.dtype.name) for key, a in arrays.items()]
        identity = {"made for": f"tests {task}", "block_size": block_size}
        key = StoreKey(name, identity, rows, columns)
        writer = StoreWriter.open(self.folder, key, block_size)
        for i in writer.missing_blocks():
            block = writer.block_rows(i)
            bad = [{"row": int(r), "uid": "", "reason": "made up"} for r in block if r in self.bad]
            blank = np.isin(block, self.bad)
            writer.write_block(i, {k: _blanked(a[block], blank) for k, a in arrays.items()}, bad)
        writer.finish()
        return StoreReader.open(writer.folder)

    def context(self, block_size: int = 16, method: Method | None = None) -> Context:
        """What `method` is handed; without one, every signal that this world has."""
        arrays = {"forward": self.forward, **self.others}
        if method is not None:
            arrays = {name: self.arrays(name, signal) for name, signal in method.signals().items()}
        rows = np.arange(len(self.pool))
        return Context(
            self.pool,
            {name: self.store(name, columns, rows, block_size) for name, columns in arrays.items()},
            tasks=self.tasks(block_size, method and method.target_signals()),
            k=K,
        )

    def arrays(self, name: str, signal: Any) -> dict[str, np.ndarray]:
        """The columns of a signal: those of its kind that this world has, the others made up.

        One that goes by another name than its kind has numbers of its own. All follow the samples,
        not their places.
        """
        known = {"forward": self.forward, "perturbed": self.perturbed, **self.others}
        place = np.empty(len(self.pool), np.int64)
        place[np.argsort(self.pool.uids.view("V16").ravel())] = np.arange(len(self.pool))
        arrays = known.get(name)
        if arrays is None:
            factor = _generator(name).lognormal(size=len(place))[place]
            of_kind = known.get(signal.name, {})
            arrays = {key: _scaled(array, factor) for key, array in of_kind.items()}
        made = {
            column.name: _made_up(column, name, len(place))[place]
            for column in signal.columns(SCORER)
            if column.name not in arrays
        }
        return {**arrays, **made}

    def tasks(self, block_size: int, signals: Mapping[str, Any] | None = None) -> tuple[Task, ...]:
        """Tasks a and b, whose sub-tasks are a, b/1 and b/2, with readers of `signals`."""
        rows, readers = np.arange(N_OF_TARGET), {}
        for subtask, known in self.targets.items():
            arrays = known
            if signals is not None:
                arrays = {
                    name: {
                        column.name: _made_up(column, f"{name} {subtask}", N_OF_TARGET)
                        for column in signal.columns(SCORER)
                    }
                    | known.get(name, known.get(signal.name, {}))
                    for name, signal in signals.items()
                }
            readers[subtask] = {
                name: self.store(name, columns, rows, block_size, subtask)
                for name, columns in arrays.items()
            }
        names = {"a": ("a",), "b": ("b/1", "b/2")}
        return tuple(
            Task(
                task, 1.0, of_task, {n: tuple(readers[s][n] for s in of_task) for n in readers["a"]}
            )
            for task, of_task in names.items()
        )

    def run(self, method: Method, seed: int = 0, block_size: int = 16) -> Scored:
        """`Method.run` with stores of `block_size`; the rows it asks for go to `requested`."""

        def extract(requests: Mapping[str, Request]) -> dict[str, StoreReader]:
            self.requested += [request.rows for request in requests.values()]
            return {
                name: self.store(name, self.arrays(name, request.signal), request.rows, block_size)
                for name, request in requests.items()
            }

        return method.run(self.context(block_size, method), seed, extract)

    def reordered(self, folder: Path, order: np.ndarray) -> World:
        """The same samples with the same signals in another order."""
        raws = [self.pool.raw(int(row)) for row in order]
        folder.mkdir()
        atomic_write(folder / "pool.json", b"[" + b",".join(raws) + b"]")
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


def make_world(folder: Path, n: int = 150, seed: int = 0, formats=tuple(WORDINGS)) -> World:
    """`n` samples over `formats` and three sources; vectors lie around one direction per format."""
    # The pool: what a record looks like depends on its format alone.
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
    atomic_write(folder / "pool.json", json.dumps(records).encode())

    # The signals most methods read, with their NaN where a sample has no perturbation.
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

    # Further ones from generators of their own, so that a new one moves no number of the others.
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
    """Signals of the samples of a sub-task, which lie around `centre` (H,)."""
    centres = np.tile(centre, (N_OF_TARGET, 1))
    states = (centres + rng.normal(size=(N_OF_TARGET, H))).astype(np.float16)
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


def _made_up(column: Column, name: str, n: int) -> np.ndarray:
    """Numbers (n, *shape) of a column of signal `name`: the same whenever they are asked for."""
    rng = _generator(f"{name}.{column.name}")
    if np.issubdtype(np.dtype(column.dtype), np.integer):
        return rng.integers(0, 100, (n, *column.shape)).astype(column.dtype)
    draw = rng.normal if column.shape else rng.exponential
    return draw(size=(n, *column.shape)).astype(column.dtype)


def _scaled(array: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Rows of `array` (n, ...) times `factor` (n,); whole numbers stay."""
    if not np.issubdtype(array.dtype, np.floating):
        return array
    return (array * factor.reshape(-1, *[1] * (array.ndim - 1))).astype(array.dtype)


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def _blanked(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A copy with NaN, or 0, in `rows` (n,) bool: what is stored of a sample without numbers."""
    array = array.copy()
    array[rows] = np.nan if np.issubdtype(array.dtype, np.floating) else 0
    return array
