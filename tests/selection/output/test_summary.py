"""What a finished run prints."""

from __future__ import annotations

import numpy as np

from selection.output.summary import source_shares


def test_source_shares_against_a_slow_loop():
    rng = np.random.default_rng(0)
    sources = rng.choice(["b", "a", "longer"], 200, p=[0.5, 0.3, 0.2])
    chosen = rng.random(200) < 0.3
    shares = source_shares(sources, chosen)
    for name, in_pool, in_subset in shares:
        assert in_pool == sum(source == name for source in sources)
        assert in_subset == sum(
            source == name and took for source, took in zip(sources, chosen, strict=True)
        )
    assert [pool for _, pool, _ in shares] == sorted((s[1] for s in shares), reverse=True)
    assert sum(subset for _, _, subset in shares) == chosen.sum()


def test_source_without_a_chosen_sample_is_shown():
    shares = source_shares(np.array(["a", "b", "b"]), np.array([True, False, False]))
    assert shares == [("b", 2, 0), ("a", 1, 1)]
