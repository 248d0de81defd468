"""Corrupted copies x' of a sample, the one kind that its format can be attacked with (ARDS, S_m).

    multiple choice        symbol and permutation attacks (llava/eval/question.py)
    other, with an image   the image after a few steps of forward diffusion, as in VCD
    other, without         none

Differs from the authors' code: options are permuted as data; a perturbed copy keeps its image; the
noisy image is clamped (theirs wraps around at 0 and 255) and its noise is a function of the
sample, not of the moment.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from llava.eval import question as attacks

Turns = Sequence[tuple[str, str]]  # (role, text), role "human" or "gpt"

DIFFUSION_STEPS = 1000
_BAND = 2**20  # values of an image that are noised at a time: bounds memory at any image size


@dataclass(frozen=True)
class PerturbedRecord:
    """One corrupted copy of a multiple-choice sample."""

    order_index: int
    """which of the sample's orders this is, counted from 0 (the given order)"""
    turns: tuple[tuple[str, str], ...]
    """the whole conversation, answers mapped to the symbol now beside the right option"""


def perturbations(
    turns: Turns,
    key: str,
    symbols: str | None = "qwer",
    max_orders: int = attacks.MAX_ORDERS,
    permute: bool = True,
) -> list[PerturbedRecord]:
    """All corrupted copies of a multiple-choice sample; an empty list if it is none.

    Copy `k` rewrites every multiple-choice turn (`choice_turns`) by its own k-th order, starting
    again after its last, and by the symbols; the other turns stay.

    Args:
        key: names the sample (its uid); decides which orders are drawn when not all are used.
        symbols: a name in `attacks.SYMBOLS`, or None to keep the letters.
        max_orders: at most this many copies; the default is all for up to five options.
        permute: False leaves the order alone, so that there is one copy, under other symbols.
    """
    # The orders of each question are drawn apart, so that one more turn changes no other's.
    questions = choice_turns(turns)
    limit = max_orders if permute else 1
    ways = {
        index: attacks.orders(len(question.options), f"{key}|{index}", limit)
        for index, (question, _) in questions.items()
    }
    n_copies = max(map(len, ways.values()), default=0)
    # An answer is exchanged where it stands, with the space that it has around it.
    copies = []
    for k in range(n_copies):
        copy = [tuple(turn) for turn in turns]
        for index, (question, gold) in questions.items():
            order = ways[index][k % len(ways[index])]
            names = attacks.SYMBOLS[symbols] if symbols else question.symbols
            copy[index] = (turns[index][0], question.render(order, names))
            answer = turns[index + 1][1]
            symbol = question.symbol(gold, order, names)
            copy[index + 1] = (turns[index + 1][0], answer.replace(answer.strip(), symbol))
        copies.append(PerturbedRecord(k, tuple(copy)))
    return copies


def choice_turns(turns: Turns) -> dict[int, tuple[attacks.Question, int]]:
    """Position of each multiple-choice turn -> the question and its right option.

    A turn is one when its text parses and the next turn is the bare symbol of an option.
    """
    questions = {}
    for index, ((role, text), (next_role, answer)) in enumerate(
        zip(turns, turns[1:], strict=False)
    ):
        if (role, next_role) != ("human", "gpt"):
            continue
        question = attacks.parse_question(text)
        gold = question.option(answer) if question else None
        if gold is not None:
            questions[index] = (question, gold)
    return questions


def signal_and_noise(step: int) -> tuple[float, float]:
    """VCD's schedule: `sqrt(abar_t)` and `sqrt(1 - abar_t)` of q(x_t | x_0) at 0-based `step`.

    beta rises as a sigmoid from 1e-5 to 5e-3 over 1000 steps; step 300 gives 0.981 and 0.194.
    """
    if not 0 <= step < DIFFUSION_STEPS:
        raise ValueError(f"diffusion step {step} is outside 0..{DIFFUSION_STEPS - 1}")
    position = np.linspace(-6, 6, DIFFUSION_STEPS)
    beta = (5e-3 - 1e-5) / (1 + np.exp(-position)) + 1e-5
    kept = float(np.prod(1 - beta[: step + 1]))
    return math.sqrt(kept), math.sqrt(1 - kept)


def noise_generator(key: str) -> np.random.Generator:
    """The generator of a sample's noise, keyed with sha256 of `key`: the same on every machine."""
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16])))


def diffuse(image: Image.Image, uid: str, step: int = 300, seed: int = 0) -> Image.Image:
    """`image` after `step` steps of forward diffusion, clamped to [0, 1], as 8-bit RGB.

    To be applied to the image as opened, before padding and resizing, so that the padding a
    processor adds stays clean. The Gaussian noise comes from a counter-based generator keyed with
    sha256 of seed and uid: the same sample gets the same noise in every run and on every machine.
    """
    signal, noise = signal_and_noise(step)
    draw, pixels = noise_generator(f"{seed}|{uid}"), np.array(image.convert("RGB"))
    flat = pixels.reshape(-1)
    for start in range(0, flat.size, _BAND):
        band = flat[start : start + _BAND]
        values = np.float32(signal / 255) * band
        values += np.float32(noise) * draw.standard_normal(band.size, dtype=np.float32)
        band[:] = np.rint(np.clip(values, 0, 1) * 255)
    return Image.fromarray(pixels)
