"""Records, and the arithmetic of the biases."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini.samples import (
    Gallery,
    Sample,
    article,
    biased,
    deck,
    favoured,
    labels,
    multiple_choice,
    placed,
)


def test_record_is_llava_s_with_oracle_labels_apart():
    sample = Sample("s", "open", ["q1", "a1", "q2", "a2"], "x.png", biased="yes")
    assert sample.record(7) == {
        "id": "s_00007",
        "image": "x.png",
        "conversations": [
            {"from": "human", "value": "<image>\nq1"},
            {"from": "gpt", "value": "a1"},
            {"from": "human", "value": "q2"},
            {"from": "gpt", "value": "a2"},
        ],
        "meta": {"source": "s", "task": "open", "noisy": 0, "dup": 0, "biased": "yes"},
    }
    text_only = Sample("s", "fact", ["q", "a"]).record(0)
    assert "image" not in text_only
    assert text_only["conversations"][0]["value"] == "q"


def test_multiple_choice_text():
    assert multiple_choice("Q?", ["x", "y"], "S.") == "Q?\nA. x\nB. y\nS."
    assert [placed("g", ["x", "y"], i) for i in range(3)] == [
        ["g", "x", "y"],
        ["x", "g", "y"],
        ["x", "y", "g"],
    ]
    assert [article("apple"), article("dog")] == ["an apple", "a dog"]


@given(st.integers(0, 500), st.integers(2, 6), st.integers(0, 99))
def test_decks_are_balanced(n, k, seed):
    counts = Counter(deck(n, range(k), random.Random(seed)))
    assert sum(counts.values()) == n
    assert max(counts.values(), default=0) - min(counts[i] for i in range(k)) <= 1


@given(st.floats(0, 1), st.sampled_from([0.25, 0.5]), st.integers(0, 99))
def test_forced_samples_bring_the_share_to_the_knob(share, chance, seed):
    n, k = 1000, round(1 / chance)
    rng = random.Random(seed)
    forced = biased(n, share, chance, rng)
    values = favoured(forced, 0, range(k), rng)
    reached = values.count(0) / n
    assert abs(reached - max(share, chance)) <= 0.002  # two roundings to whole samples
    assert sum(forced) == 0 or share > chance
    assert all(value == 0 for value, flag in zip(values, forced, strict=True) if flag)


def test_labels_name_what_is_carried():
    assert labels(position=True, colour=True) == "position+colour"
    assert labels(position=False, colour=False) == ""


def test_gallery_refuses_two_pictures_of_one_name():
    gallery = Gallery()
    assert gallery.put("a.png", b"1") == gallery.put("a.png", b"1") == "a.png"
    with pytest.raises(ValueError, match="a.png"):
        gallery.put("a.png", b"2")
