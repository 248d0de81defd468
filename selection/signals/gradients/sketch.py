"""Random projections of gradients into `dim` numbers that keep inner products.

For every projection S here E<S g, S v> = <g, v>. All randomness is a function of (seed, matrix
name, element index), in integer arithmetic that is the same on every device and for every dtype,
batch and sharding. Projections are linear, and the projections of a model's matrices add up, so
that no flat gradient of the whole model is ever put together.

    count_sketch   every element gets a sign and one of `dim` buckets: O(1) an element
    rademacher     a dense matrix of signs, as TRAK, LESS and ICONS have it: O(dim) an element
    two_sided      L G R^T for each matrix G, as LoGra has it; a higher variance where gradients
                   are of low rank, as those of short answers are

The count-sketch has the mean and variance of the dense projection (Charikar et al. 2002):

    Var <S g, S v> = (|g|^2 |v|^2 + <g, v>^2 - 2 sum_i g_i^2 v_i^2) / dim

Its buckets are those of a cyclic shift: a row of `dim` consecutive elements is rotated by a random
amount. Two elements of one row never meet, two others do with probability 1/dim, so the variance
is at most the above, and the whole is an element-wise product, a gather and a sum.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import xxhash

from llava.lazy import Lazy
from selection.vectors.mixing import GOLDEN, mixed, signed

if TYPE_CHECKING:
    from torch import Tensor

torch = Lazy("torch")
F = Lazy("torch.nn.functional")


_DENSE_BLOCK = 1 << 22  # signs of the dense matrix that exist at a time


def count_sketch(matrices: Tensor, name: str, dim: int, seed: int, start: int = 0) -> Tensor:
    """Signed count-sketch of each of `matrices` (B, ...) float32, flattened: (B, dim) float32.

    `name` is the matrix's; `start` is the index of the first element in it, where these are one
    shard of it. The sketches of shards and of matrices add up.
    """
    flat = matrices.flatten(1)
    lead = start % dim
    flat = flat * signs(f"{seed}/sign/{name}", start, flat.shape[1], flat.device)
    rows = F.pad(flat, (lead, -(lead + flat.shape[1]) % dim)).unflatten(1, (-1, dim))
    shifts = _words(f"{seed}/shift/{name}", start // dim, rows.shape[1], flat.device) % dim
    source = (torch.arange(dim, device=flat.device) - shifts[:, None]) % dim  # (rows, dim)
    return rows.gather(2, source.expand_as(rows)).sum(1)


def rademacher(matrices: Tensor, name: str, dim: int, seed: int) -> Tensor:
    """Product of each of `matrices` (B, ...), flattened, with a dense matrix of signs: (B, dim)."""
    flat = matrices.flatten(1)
    out = flat.new_zeros(len(flat), dim)
    step = max(1, _DENSE_BLOCK // dim)
    for first in range(0, flat.shape[1], step):
        part = flat[:, first : first + step]
        n = part.shape[1]
        dense = signs(f"{seed}/sign/{name}", first * dim, n * dim, flat.device).view(n, dim)
        # One product a sample: batched ones round differently for different batch sizes.
        out += torch.stack([row @ dense for row in part])
    return out / math.sqrt(dim)


def two_sided(matrices: Tensor, name: str, dim: int, seed: int) -> Tensor:
    """L G R^T of each G in `matrices` (B, m, n), flattened: (B, dim).

    L is p x m and R is q x n, of signs, with p q = `dim` and p as near its root as divides it.
    """
    _, m, n = matrices.shape
    p = next(p for p in range(math.isqrt(dim), 0, -1) if dim % p == 0)
    left = signs(f"{seed}/left/{name}", 0, p * m, matrices.device).view(p, m)
    right = signs(f"{seed}/right/{name}", 0, dim // p * n, matrices.device).view(dim // p, n)
    products = [torch.linalg.multi_dot([left, matrix, right.T]) for matrix in matrices]
    return torch.stack(products).flatten(1) / math.sqrt(dim)


PROJECTIONS = {
    "count_sketch": count_sketch,
    "rademacher": rademacher,
    "two_sided": two_sided,
}


def signs(key: str, start: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Signs number `start`, ..., `start + n - 1` of the stream `key`: (n,) float32, -1 or 1."""
    first, last = start // 64, -(-(start + n) // 64)
    words = _words(key, first, last - first, device).view(torch.uint8)  # 8 signs a byte
    bits = (words[:, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    chosen = bits.flatten()[start - 64 * first :][:n]
    return 1 - 2 * chosen.float()


def _words(key: str, first: int, n: int, device: torch.device | str) -> Tensor:
    """Words `first`, ... of SplitMix64 (Steele et al. 2014) from the state that `key` hashes to.

    (n,) int64.
    """
    state = signed(xxhash.xxh3_64_intdigest(key.encode()))
    return mixed(torch.arange(first + 1, first + n + 1, device=device) * GOLDEN + state)
