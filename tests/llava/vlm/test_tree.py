"""A tree holds every text once, and its nodes see their own way only."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llava.vlm.tree import attention_mask, grow, has_one_mask, window_of

TEXTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8)


@given(TEXTS)
def test_every_text_is_the_way_to_its_end(texts):
    tree = grow(texts)
    assert [tree.ids[tree.sees[end]].tolist() for end in tree.ends] == texts
    assert [int(tree.depths[end]) for end in tree.ends] == [len(text) - 1 for text in texts]
    assert not tree.sees.triu(1).any()  # nodes come after their parents
    beginnings = {tuple(text[: k + 1]) for text in texts for k in range(len(text))}
    assert len(tree.ids) == len(beginnings)


@given(TEXTS, st.integers(0, 4), st.none() | st.integers(1, 7))
def test_mask_is_what_each_text_would_see_alone(texts, n, window):
    tree = grow(texts)
    positions = n + tree.depths
    mask = attention_mask(tree.sees, torch.cat([torch.arange(n), positions]), window)[0, 0]
    keys = [*range(n), *positions.tolist()]
    for query, row in enumerate(mask.tolist()):
        for key, seen in enumerate(row):
            on_its_way = key < n or bool(tree.sees[query, key - n])
            near = window is None or n + int(tree.depths[query]) - keys[key] < window
            assert seen == (on_its_way and near)


@pytest.mark.parametrize(
    ("text", "one", "window"),
    [
        ({}, True, None),
        ({"sliding_window": 9}, True, 9),
        ({"sliding_window": 9, "layer_types": ["full_attention"] * 2}, True, None),
        ({"sliding_window": 9, "layer_types": ["sliding_attention"] * 2}, True, 9),
        ({"layer_types": ["sliding_attention", "full_attention"]}, False, None),
        ({"layer_types": ["chunked_attention"] * 2}, False, None),
    ],
)
def test_windows(text, one, window):
    config = SimpleNamespace(**text)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    assert has_one_mask(model) == one
    if one:
        assert window_of(model) == window
