"""Arrays of a caller read like a store."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from llava.errors import UsageError
from selection.pool.pool import Pool
from selection.store.arrays import ArrayReader

N = 3000


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Pool:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    records = [{"id": i, "conversations": turns if i != 5 else "none"} for i in range(N)]
    path = tmp_path_factory.mktemp("arrays") / "pool.json"
    path.write_text(json.dumps(records))
    return Pool.open(path)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "last_state": rng.normal(size=(N, 4)).astype(np.float32),
        "nll_mean": rng.exponential(size=N),
        "n_tokens": rng.integers(1, 9, N).astype(np.uint8),
    }


def test_columns_blocks_and_rows_are_the_arrays(pool, arrays):
    reader = ArrayReader("forward", arrays, pool)
    assert len(reader) == N and reader.rows.tolist() == list(range(N))
    for name, array in arrays.items():
        np.testing.assert_array_equal(reader.column(name), array)
        streamed = [block for _, block in reader.blocks(name)]
        np.testing.assert_array_equal(np.concatenate(streamed), array)
        np.testing.assert_array_equal(reader.take(name, [7, 3, 3]), array[[7, 3, 3]])
    parts = list(reader.blocks(["last_state", "nll_mean"]))
    assert [part.stop - part.start for part, _ in parts] == [1024, 1024, 952]
    np.testing.assert_array_equal(parts[1][1]["nll_mean"], arrays["nll_mean"][1024:2048])
    assert reader.columns["last_state"].shape == (4,)
    assert reader.columns["n_tokens"].dtype == "int64"


def test_rows_without_numbers_are_told_like_those_of_a_store(pool, arrays):
    arrays["last_state"][9, 2] = np.nan
    arrays["nll_mean"][[11, 12]] = np.nan, np.inf
    reader = ArrayReader("forward", arrays, pool)
    assert reader.bad_rows.tolist() == [5, 9, 12]  # the pool's, a vector's, an infinite number's
    reasons = [note["reason"] for note in reader.bad]
    assert reasons[0] == pool.bad[5]
    assert reasons[1:] == [f"{n} is not finite in the given array" for n in list(arrays)[:2]]


def test_lists_and_tensors_are_arrays(pool, arrays):
    given = {"last_state": torch.tensor(arrays["last_state"]), "nll_mean": list(range(N))}
    reader = ArrayReader("forward", given, pool)
    np.testing.assert_array_equal(reader.column("last_state"), arrays["last_state"])
    assert reader.column("nll_mean").dtype == np.int64


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (np.zeros((N - 1, 4)), r"forward.last_state has shape \(2999, 4\); give one row for each"),
        (3.0, r"has shape \(1,\)"),
        (["a"] * N, "forward.last_state is <U1; give numbers"),
        (np.zeros(N, complex), "is complex128; give numbers"),
        ([[1.0], [1.0, 2.0]] * (N // 2), "forward.last_state is no array"),
        (torch.zeros(N, 2, dtype=torch.bfloat16), "forward.last_state is no array"),
    ],
)
def test_what_is_no_array_of_the_pool_is_refused(pool, given, told):
    with pytest.raises(UsageError, match=f"arrays: .*{told}"):
        ArrayReader("forward", {"last_state": given}, pool)


def test_the_fingerprint_is_of_names_and_numbers(pool, arrays):
    def fingerprint(**changes) -> str:
        return ArrayReader("forward", {**arrays, **changes}, pool).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    turned = dict(reversed(arrays.items()))
    assert ArrayReader("forward", turned, pool).fingerprint == first
    assert fingerprint(nll_mean=arrays["nll_mean"] + 1) != first
    assert fingerprint(nll_mean=arrays["nll_mean"].astype(np.float32)) != first
    assert fingerprint(el2n=arrays["nll_mean"]) != first


def test_a_state_given_alone_serves_one_that_is_read(pool, arrays):
    reader = ArrayReader("forward", {"mean_state": arrays["last_state"]}, pool)
    np.testing.assert_array_equal(reader.column("last_state"), arrays["last_state"])
    assert reader.columns["last_state"].shape == (4,)
    assert reader.notes == ["mean_state of the given arrays was read as last_state"]
    with pytest.raises(UsageError, match="forward.attention_state is read too"):
        reader.column("attention_state")
    with pytest.raises(UsageError, match="forward.nll_mean is read too; give it beside mean_state"):
        reader.column("nll_mean")


def test_of_two_states_none_serves_a_third(pool, arrays):
    states = dict.fromkeys(("mean_state", "attention_state"), arrays["last_state"])
    with pytest.raises(UsageError, match="forward.last_state is read too"):
        ArrayReader("forward", states, pool).take("last_state", [1])
