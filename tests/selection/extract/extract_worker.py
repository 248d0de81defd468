"""One rank of an extraction: `extract_worker.py MODEL POOL IMAGES STORE SIGNAL`."""

from __future__ import annotations

import sys
from datetime import timedelta

import numpy as np
import torch

from llava import ranks
from llava.vlm import load_vlm
from selection.extract.loop import extract
from selection.pool.pool import Pool
from selection.settings import PoolSettings, ProxySettings
from selection.signals.forward import Forward
from selection.signals.gradients.gradients import Gradients

SIGNALS = {"forward": Forward(), "gradients": Gradients(dim=256, rank=8)}

model, pool_path, images, store, name = sys.argv[1:]
torch.set_num_threads(1)
pool = Pool.open(pool_path)
rows = np.arange(len(pool))
where = PoolSettings(pool_path, images)
settings = ProxySettings(store=store, device="cpu", batch_size=7, block_size=6)
ranks.join(timedelta(minutes=5))
extract([SIGNALS[name]], load_vlm(model), pool, rows, where, settings)
