"""Random bits are SplitMix64's, for arrays and tensors alike."""

import numpy as np
import torch

from selection.vectors.mixing import GOLDEN, mixed, signed

WORD = 1 << 64
STATES = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]


def slow_mixed(x: int) -> int:
    """The finaliser in Python's own whole numbers."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def test_arrays_and_tensors_give_splitmix64s_words():
    words = np.array([signed(state) for state in STATES])
    expected = [signed(slow_mixed(state)) for state in STATES]
    assert mixed(words).tolist() == mixed(torch.from_numpy(words)).tolist() == expected
    assert mixed(words).dtype == np.int64


def test_the_published_first_words_of_seed_0():
    """Those of the reference implementation, https://prng.di.unimi.it/splitmix64.c."""
    states = np.arange(1, 4) * GOLDEN
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert mixed(states).view(np.uint64).tolist() == first
