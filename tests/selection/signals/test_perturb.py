"""Corrupted copies: exactly the option order, the symbols and the answer change; noise is VCD's."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from llava.eval.question import SYMBOLS, orders, parse_question
from selection.signals.perturb import diffuse, perturbations, signal_and_noise

EN = "Answer with the option's letter from the given choices directly."
QUESTION = f"<image>\nWhich is it?\nA. cat\nB. dog\nC. cow\n{EN}"
TURNS = [
    ("human", QUESTION),
    ("gpt", "B"),
    ("human", "What colour?\nAnswer the question using a single word or phrase."),
    ("gpt", "Red"),
    ("human", f"And this?\nA. one\nB. two\n{EN}"),
    ("gpt", " A\n"),
]


def test_copy_k_uses_the_kth_order_of_every_question():
    copies = perturbations(TURNS, "uid")
    assert [copy.order_index for copy in copies] == list(range(6))
    for k, copy in enumerate(copies):
        assert copy.turns[2:4] == tuple(TURNS[2:4])
        for index, texts, gold in ((0, ["cat", "dog", "cow"], "dog"), (4, ["one", "two"], "one")):
            n = len(texts)
            order = orders(n, "")[k % [6, 2][index == 4]]
            shown = [f"{SYMBOLS['qwer'][i]}. {texts[option]}" for i, option in enumerate(order)]
            stem = TURNS[index][1].split("\n" + "A. ")[0]
            assert copy.turns[index] == ("human", "\n".join([stem, *shown, EN]))
            answer = copy.turns[index + 1][1]
            assert shown[SYMBOLS["qwer"].index(answer.strip())].endswith(gold)
    assert copies[0].turns[5] == ("gpt", " Q\n")


def test_copies_are_distinct_and_keep_the_image():
    copies = perturbations(TURNS, "uid")
    assert len({copy.turns for copy in copies}) == len(copies)
    assert all(copy.turns[0][1].startswith("<image>\n") for copy in copies)


def test_kept_letters_start_with_the_original():
    copies = perturbations(TURNS, "uid", symbols=None)
    assert copies[0].turns == tuple(TURNS)
    assert parse_question(copies[5].turns[0][1]).options == ("cow", "dog", "cat")


def test_without_permutation_there_is_one_copy():
    (copy,) = perturbations(TURNS, "uid", symbols="snvf", permute=False)
    assert copy.turns[1] == ("gpt", "N")
    assert "S. cat\nN. dog\nV. cow" in copy.turns[0][1]


def test_max_orders_cuts_by_the_samples_key():
    five = [("human", "Q?\nA. a\nB. b\nC. c\nD. d\nE. e"), ("gpt", "A")]
    assert len(perturbations(five, "u")) == 120
    assert len(perturbations(five, "u", max_orders=24)) == 24
    assert perturbations(five, "u", max_orders=24) == perturbations(five, "u", max_orders=24)
    assert perturbations(five, "u", max_orders=24) != perturbations(five, "v", max_orders=24)


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [("human", "Hello"), ("gpt", "A")],
        [("human", QUESTION), ("gpt", "dog")],
        [("human", QUESTION), ("gpt", "D")],
        [("human", QUESTION)],
        [("gpt", QUESTION), ("human", "A")],
    ],
)
def test_other_samples_have_no_copies(turns):
    assert perturbations(turns, "uid") == []


def test_schedule_against_a_slow_product():
    """selection-methods 1.4: sqrt(abar) is 0.981 at step 300."""
    kept = 1.0
    for t in range(301):
        position = -6 + 12 * t / 999
        kept *= 1 - ((5e-3 - 1e-5) / (1 + np.exp(-position)) + 1e-5)
    signal, noise = signal_and_noise(300)
    assert signal == pytest.approx(kept**0.5, rel=1e-9) and round(signal, 3) == 0.981
    assert noise == pytest.approx((1 - kept) ** 0.5, rel=1e-9)
    with pytest.raises(ValueError, match="step 1000"):
        signal_and_noise(1000)


def test_noise_has_the_schedules_mean_and_spread():
    grey = Image.new("RGB", (900, 900), (128, 128, 128))
    values = np.asarray(diffuse(grey, "uid"), dtype=np.float64) / 255
    # Mean 0.981 * 0.502; four standard errors of 2.4 million draws are 0.0005. At a spread of 0.194
    # one value in 90 is clamped, which takes less than 0.002 off the spread.
    assert values.mean() == pytest.approx(0.981 * 128 / 255, abs=0.001)
    assert values.std() == pytest.approx(0.194, abs=0.003)


def test_noise_is_clamped_not_wrapped():
    black = np.asarray(diffuse(Image.new("RGB", (300, 300)), "uid"))
    white = np.asarray(diffuse(Image.new("RGB", (300, 300), (255, 255, 255)), "uid"))
    assert (black == 0).mean() > 0.49 and black.max() < 255
    assert (white == 255).mean() > 0.45 and white.min() > 0


def test_noise_depends_on_sample_and_seed_alone():
    image = Image.new("RGBA", (40, 30), (200, 10, 60, 255))
    first = diffuse(image, "a")
    assert first.size == (40, 30) and first.mode == "RGB"
    assert first.tobytes() == diffuse(image, "a").tobytes()
    assert first.tobytes() != diffuse(image, "b").tobytes()
    assert first.tobytes() != diffuse(image, "a", seed=1).tobytes()
    assert image.getpixel((0, 0)) == (200, 10, 60, 255)


def test_large_images_are_noised_in_bands_with_one_stream(monkeypatch):
    image = Image.new("RGB", (50, 50), (100, 100, 100))
    whole = diffuse(image, "a").tobytes()
    monkeypatch.setattr("selection.signals.perturb._BAND", 1001)
    assert diffuse(image, "a").tobytes() == whole
