from pathlib import Path

import numpy as np

from selection.signals.forward import Forward
from tests.extraction import N, columns, estimate


def test_plan_tells_what_extraction_does(world, tmp_path):
    rows = np.arange(N)
    options = {"batch_size": 4, "block_size": N}
    told = estimate(Forward(), world.proxy, world.pool, rows, tmp_path, world.images, **options)
    assert not list(tmp_path.iterdir())
    batches, tokens = [], 0

    class Counting(Forward):
        def compute(self, proxy, items):
            nonlocal tokens
            batches.append(len(items))
            tokens += sum(item.n_tokens for item in items)
            return super().compute(proxy, items)

    reader = world.extract(tmp_path, Counting(), **options)
    assert (told["samples"], told["batches"], told["tokens"]) == (N, len(batches), tokens)
    assert told["bytes"] == sum(array.nbytes for array in columns(reader).values())
    assert 0 < told["padding"] < 0.1 and told["seconds"] > 0 and not told["stored"]
    again = estimate(Forward(), world.proxy, world.pool, rows, tmp_path, world.images)
    assert again["stored"] and Path(again["folder"]) == reader.folder
