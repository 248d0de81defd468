"""What a projection of gradients loses: influences and subsets from sketches against exact ones.

    python benchmarks/rank_fidelity.py --model outputs/warmup-mini-0.05-0/model \
        --model_base mini/base/llama [--data playground/mini] [--samples 2000] [--dims 512,1024,...]

Takes `--samples` samples of the small world's pool, evenly spaced, and its target tasks (`bash
selection.sh icons` has built both, and the model), and computes the mean cosine of each sample's
gradient to each task exactly (benchmarks/influence_signal.py) and from count-sketches of several
dimensions. Prints, for each dimension,

    Spearman   rank correlation of the two influences, by task
    Jaccard    |A n B| / |A u B| of the 20 % with the highest of them, by task, and of the 20 % that
               ICONS selects from all tasks

A sketch's cosine is off by about 1/sqrt(dim), the mean over a task's samples by less. Two threads;
three backward passes' time of 2000 samples a dimension, about a minute each.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.influence_signal import ExactInfluence, mean_unit_gradients
from llava.images import open_image
from llava.vlm import Vlm, load_vlm
from llava.vlm.base import Prepared
from selection.extract.loop import extract
from selection.output.compare import rank_correlations
from selection.pool.pool import Pool
from selection.pool.targets import Target, read_targets
from selection.rules.budget import top_k
from selection.rules.consensus import vote
from selection.rules.influence import direction, products
from selection.settings import PoolSettings, ProxySettings
from selection.signals.base import Sample, Signal
from selection.signals.gradients.gradients import Gradients
from selection.store.store import StoreReader

SHARE = 0.2


def prepared(gradients: Gradients, proxy: Vlm, target: Target) -> list[Prepared]:
    """Model inputs of all samples of a task."""
    items = []
    for subtask in target.subtasks:
        for row in subtask.rows.tolist():
            record, uid = subtask.pool.record(row), subtask.pool.uid(row)
            image = open_image(Path(target.images), record.image) if record.image else None
            items.append(gradients.prepare(proxy, Sample(row, uid, record, image)))
    return items


def stored(signal: Signal, proxy: Vlm, pool: Pool, rows, images, store: str) -> StoreReader:
    """The store of `signal` on pool `rows` (n,), computed where it is not there."""
    where = PoolSettings(str(pool.path), None if images is None else str(images))
    return extract([signal], proxy, pool, rows, where, ProxySettings(store=store))[0]


def exact(proxy: Vlm, pool: Pool, rows, images: Path, targets: Sequence[Target], store: str):
    """Exact influence of pool `rows` (n,) on every task, (n, K) float64."""
    gradients = Gradients()
    tasks = [prepared(gradients, proxy, target) for target in targets]
    signal = ExactInfluence(gradients, mean_unit_gradients(gradients, proxy, tasks))
    return stored(signal, proxy, pool, rows, images, store).column("influence").astype(float)


def sketched(
    dim: int, proxy: Vlm, pool: Pool, rows, images: Path, targets: Sequence[Target], store: str
):
    """The same from sketches of `dim` numbers."""
    signal, means = Gradients(dim=dim), []
    for target in targets:
        parts = [
            stored(signal, proxy, s.pool, s.rows, target.images, store) for s in target.subtasks
        ]
        sizes = [len(part) for part in parts]
        means.append(
            np.average([direction(p, "gradient", False) for p in parts], axis=0, weights=sizes)
        )
    reader = stored(signal, proxy, pool, rows, images, store)
    return products(reader, "gradient", np.stack(means, axis=1), normalize=False)


def best(scores: np.ndarray) -> np.ndarray:
    """The rows of the `SHARE` of samples with the highest scores (n,)."""
    return top_k(scores, round(SHARE * len(scores))).rows


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Shared rows of two sets, over the rows of either."""
    return len(np.intersect1d(left, right)) / len(np.union1d(left, right))


def report(names: Sequence[str], truth: np.ndarray, found: np.ndarray) -> None:
    """One line a task, and one for the consensus."""
    weights = np.ones(len(names))
    for name, a, b in zip(names, truth.T, found.T, strict=True):
        spearman = rank_correlations([a, b])[0, 1]
        error = np.sqrt(np.mean((a - b) ** 2))
        print(
            f"  {name:14} Spearman {spearman:.4f}  Jaccard {jaccard(best(a), best(b)):.3f}  "
            f"rms error {error:.1e} (spread {a.std():.1e})"
        )
    chosen = [best(vote(table, weights, SHARE)) for table in (truth, found)]
    print(f"  {'ICONS, vote':14} {'':15}  Jaccard {jaccard(*chosen):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="LoRA checkpoint, or another VLM")
    parser.add_argument("--model_base", help="what the LoRA was trained on")
    parser.add_argument("--data", type=Path, default=Path("playground/mini"), help="small world")
    parser.add_argument("--samples", type=int, default=2000, help="samples of the pool")
    parser.add_argument("--dims", default="512,1024,2560,5120", help="sketched dimensions")
    args = parser.parse_args()
    torch.set_num_threads(2)
    proxy = load_vlm(args.model, args.model_base)
    pool = Pool.open(args.data / "pool.json")
    targets = read_targets(args.data / "targets/targets.yaml")
    rows = np.unique(np.linspace(0, len(pool) - 1, args.samples).astype(int))
    names = [target.name for target in targets]
    with tempfile.TemporaryDirectory() as store:
        place = (proxy, pool, rows, args.data / "images", targets, store)
        begun = time.perf_counter()
        truth = exact(*place)
        print(f"{len(rows)} samples, {len(names)} tasks: exact {time.perf_counter() - begun:.0f} s")
        for dim in map(int, args.dims.split(",")):
            begun = time.perf_counter()
            found = sketched(dim, *place)
            print(f"dim {dim}: {time.perf_counter() - begun:.0f} s")
            report(names, truth, found)


if __name__ == "__main__":
    main()
