"""CLIP features and score: one batched pass over distinct images, against one sample at a time.

    python benchmarks/clip_features.py [--data playground/mini] [--samples 2000]

The reference is what the released code does: for every sample, open the image, run both encoders
on the one sample for the features, and again for the score. Ours is the signal `Clip` into a fresh
store, checksums and syncs included. On the first `--samples` samples of the small world, in turn,
CPU seconds and wall seconds; `python -m mini clip` makes the model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from llava.images import open_image
from selection.extract.loop import extract_signal
from selection.pool.pool import Pool
from selection.settings import PoolSettings, ProxySettings
from selection.signals.clip import Clip, distinct_images, text_of
from selection.signals.clip_models import ClipModel, load_clip


def one_by_one(model: ClipModel, pool: Pool, images: Path) -> np.ndarray:
    """CLIP score of every sample, everything computed once for the features, once for the score."""
    scores = []
    for row in range(len(pool)):
        record = pool.record(row)
        for _ in ("features", "score"):
            ids = model.tokens(text_of(record))[None]
            text = F.normalize(model.model.get_text_features(ids).pooler_output, dim=-1)
            if record.image is None:
                score = np.nan
                continue
            pixels = model.pixels(open_image(images, record.image))[None]
            image = model.model.get_image_features(pixel_values=pixels).pooler_output
            score = float((F.normalize(image, dim=-1) * text).sum())
        scores.append(score)
    return np.array(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("playground/mini"))
    parser.add_argument("--samples", type=int, default=2000)
    args = parser.parse_args()
    path, images, clip = args.data / "pool.json", args.data / "images", args.data / "clip"
    pool, model = Pool.open(path, args.samples), load_clip(str(clip), "float32", "cpu")
    rows = np.arange(len(pool))
    n_images = len(distinct_images(pool, rows))
    print(f"{len(pool)} samples, {pool.has_image.sum()} with an image, {n_images} images")
    with torch.inference_mode(), tempfile.TemporaryDirectory() as store:
        cpu, wall = time.process_time(), time.monotonic()
        where = PoolSettings(str(path), str(images))
        settings = ProxySettings(store=store, device="cpu", dtype="float32", batch_size=64)
        reader = extract_signal(Clip(str(clip)), rows, pool, where, settings)
        found = reader.column("clip_score")
        mine = time.process_time() - cpu, time.monotonic() - wall
        cpu, wall = time.process_time(), time.monotonic()
        scores = one_by_one(model, pool, images)
        theirs = time.process_time() - cpu, time.monotonic() - wall
    difference = np.nanmax(np.abs(found - scores))
    print(f"largest difference of a score: {difference:.1e}")
    print(f"one sample at a time, twice: {theirs[0]:.1f} s CPU, {theirs[1]:.1f} s")
    print(f"one batched pass:            {mine[0]:.1f} s CPU, {mine[1]:.1f} s")
    print(
        f"{theirs[0] / mine[0]:.1f} times in CPU, {theirs[1] / mine[1]:.1f} times in wall seconds"
    )


if __name__ == "__main__":
    main()
