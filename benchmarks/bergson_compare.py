"""Per-sample LoRA gradients of a text-only model: this engine beside bergson 2.5.1.

    python -m venv /tmp/bergson && /tmp/bergson/bin/pip install --no-deps bergson jaxtyping \\
        wadler-lindig ml_dtypes natsort simple-parsing docstring-parser petname torchopt optree \\
        bitsandbytes datasets dill multiprocess pandas fsspec
    echo "$(pwd)/.venv/lib/python3.11/site-packages" > \\
        /tmp/bergson/lib/python3.11/site-packages/ours.pth
    PYTHONPATH=. /tmp/bergson/bin/python benchmarks/bergson_compare.py [--full] [--samples 24]

bergson is no dependency of this project: it goes into an environment of its own, on top of ours.
Both get the same model (6 x 512, LoRA r=16; --full: 12 x 1024, r=64), frozen as their own workers
freeze it, the same batches of 8 and the same lengths (200 to 256 tokens, half of them answers), and
write their rows to disk. bergson projects each matrix from both sides ("per_module") to p x p
numbers, p such that the whole row is as near 5120 as it gets, and stores float32; here a row is
5120 halves. Printed are CPU seconds a sample (one thread, smallest of the repeats), bytes a row and
the root mean square error of the cosines of all pairs against those of the whole gradients. The
error falls with the root of a row's length, so error^2 x bytes compares accuracy per stored byte.
Samples come in groups that share most of their text, so that cosines are spread.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from forward_signals import VOCABULARY
from gradients import Adapted, make_pair, matrices, one_at_a_time
from peft import PeftModel

from llava.tokens import IGNORE_INDEX
from llava.vlm.base import Prepared
from selection.signals.gradients.gradients import Gradients

DIM, BATCH, N_GROUPS = 5120, 8, 6
SHARED = 0.8  # of a group's tokens


def make_samples(n: int) -> list[Prepared]:
    """Samples in groups, longest first; a token is its group's with probability `SHARED`."""
    rng = np.random.default_rng(0)
    texts = rng.integers(3, VOCABULARY, (N_GROUPS, 256))
    samples = []
    for row in range(n):
        own = rng.integers(3, VOCABULARY, 256)
        length = 256 - 56 * row // n
        ids = np.where(rng.random(256) < SHARED, texts[row % N_GROUPS], own)[:length]
        labels = np.where(np.arange(length) < length // 2, IGNORE_INDEX, ids)
        samples.append(Prepared(torch.from_numpy(ids), torch.from_numpy(labels)))
    return samples


def ours(proxy: Adapted, samples: list[Prepared], folder: Path) -> np.ndarray:
    rows = []
    for start in range(0, len(samples), BATCH):
        rows.append(Gradients(dim=DIM).compute(proxy, samples[start : start + BATCH])["gradient"])
        rows[-1].tofile(folder / f"{start}.bin")
    return np.concatenate(rows)


def theirs(model: PeftModel, samples: list[Prepared], folder: Path) -> np.ndarray:
    from bergson import GradientProcessor, IndexConfig, collect_gradients
    from datasets import Dataset

    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    names = {name for name, _ in model.base_model.named_modules() if name.endswith(".default")}
    targets = {name for name in names if ".lora_A." in name or ".lora_B." in name}
    side = round(math.sqrt(DIM / len(targets)))
    data = Dataset.from_dict(
        {
            "input_ids": [sample.input_ids.tolist() for sample in samples],
            "labels": [sample.labels.tolist() for sample in samples],
        }
    )
    collect_gradients(
        model,
        data,
        GradientProcessor(projection_dim=side),
        IndexConfig(str(folder / "index"), projection_dim=side, loss_reduction="mean"),
        batches=[
            list(range(i, min(i + BATCH, len(samples)))) for i in range(0, len(samples), BATCH)
        ],
        target_modules=targets,
    )
    model.requires_grad_(False)
    rows = np.fromfile(folder / "index.part" / "gradients.bin", np.float32)
    return rows.reshape(len(samples), -1)


def cosines(rows: np.ndarray) -> np.ndarray:
    """Of all pairs, the upper triangle as one vector."""
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    return (unit @ unit.T)[np.triu_indices(len(rows), 1)]


def timed(work: Callable[[Path], np.ndarray], n: int) -> tuple[float, np.ndarray]:
    """CPU seconds a sample, and the rows."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        rows = work(Path(folder))
        return (time.process_time() - started) / n, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the mid-size model")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    try:
        import bergson  # noqa: F401
    except ImportError as error:
        sys.exit(f"bergson is not installed ({error}); see the top of this file: not measured")
    torch.set_num_threads(1)
    beside, proxy = make_pair(not arguments.full)
    samples = make_samples(arguments.samples)
    works = {
        "ours": lambda folder: ours(proxy, samples, folder),
        "bergson": lambda folder: theirs(beside, samples, folder),
    }
    best = dict.fromkeys(works, math.inf)
    rows = {}
    for _ in range(arguments.repeats):
        for name, work in works.items():
            seconds, rows[name] = timed(work, len(samples))
            best[name] = min(best[name], seconds)
    exact = cosines(one_at_a_time(beside, samples).numpy())
    n_numbers = sum(parameter.numel() for parameter in matrices(beside).values())
    print(
        f"{len(samples)} samples, {n_numbers:,} numbers, "
        f"cosines {exact.min():.2f}..{exact.max():.2f}"
    )
    for name, found in rows.items():
        error = np.sqrt(np.mean((cosines(found) - exact) ** 2))
        n_bytes = found.itemsize * found.shape[1]
        print(
            f"{name:8} {best[name]:6.3f} s a sample, {found.shape[1]} x {found.dtype}, {n_bytes} "
            f"bytes, error {error:.4f}, error^2 x bytes {error**2 * n_bytes:.2f}"
        )


if __name__ == "__main__":
    main()
