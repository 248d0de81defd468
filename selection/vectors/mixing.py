"""Integers mixed to random bits, the same for arrays of NumPy and PyTorch on every device."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Words = TypeVar("Words", np.ndarray, Tensor)


def mixed(words: Words) -> Words:
    """Finaliser of SplitMix64 (Steele et al. 2014): a bijection of int64 that mixes all bits.

    `words` are any shape of int64, whose products wrap around on every device.
    """
    words = (words ^ _shifted(words, 30)) * signed(0xBF58476D1CE4E5B9)
    words = (words ^ _shifted(words, 27)) * signed(0x94D049BB133111EB)
    return words ^ _shifted(words, 31)


def signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(words: Words, by: int) -> Words:
    """`words` as unsigned numbers shifted to the right."""
    return (words >> by) & ((1 << (64 - by)) - 1)


GOLDEN = signed(0x9E3779B97F4A7C15)  # the step from one state of the generator to the next
