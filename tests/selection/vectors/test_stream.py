"""Streaming of stored vectors: the same numbers, and the same bits, whatever the block size."""

import time

import numpy as np
import pytest
import torch

from llava.errors import StorageError
from selection.store.key import Column, StoreKey
from selection.store.store import StoreReader, StoreWriter
from selection.vectors import stream

N, H = 23, 6


def copied(_, parts):
    return torch.cat(list(parts), dim=1)


def make_store(folder, arrays, block_size):
    columns = [Column(name, a.shape[1:], a.dtype.name) for name, a in arrays.items()]
    rows = np.arange(len(next(iter(arrays.values()))))
    key = StoreKey("toy", {"block_size": block_size}, rows, columns)
    writer = StoreWriter.open(folder, key, block_size)
    for i in writer.missing_blocks():
        writer.write_block(i, {name: a[writer.block_rows(i)] for name, a in arrays.items()})
    writer.finish()
    return StoreReader.open(writer.folder)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "left": rng.normal(size=(N, H)).astype(np.float16),
        "right": rng.normal(size=(N, 2 * H)).astype(np.float32),
    }


@pytest.mark.parametrize("block_size", [1, 4, 7, N, 100])
@pytest.mark.parametrize("size", [1, 5, N, 64])
@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_are_the_columns_side_by_side(tmp_path, arrays, block_size, size, normalize):
    parts = [a.astype(np.float64) for a in arrays.values()]
    if normalize:
        parts = [p / np.linalg.norm(p, axis=1, keepdims=True) for p in parts]
    reader = make_store(tmp_path, arrays, block_size)
    seen = list(stream.apply(reader, list(arrays), copied, normalize, size=size))
    assert {len(v) for _, v in seen[:-1]} <= {min(size, N)}  # only the last chunk may be short
    assert [i for part, _ in seen for i in range(part.start, part.stop)] == list(range(N))
    whole = torch.cat([v for _, v in seen]).numpy()
    np.testing.assert_allclose(whole, np.hstack(parts), rtol=1e-6)


def test_take_gives_the_same_rows_as_apply(tmp_path, arrays):
    reader = make_store(tmp_path, arrays, 4)
    whole = torch.cat([v for _, v in stream.apply(reader, list(arrays), copied, True)])
    positions = np.array([22, 0, 7, 7])
    assert torch.equal(stream.take(reader, list(arrays), positions, True), whole[positions])


def test_a_zero_row_stays_zero_and_a_nan_row_stays_its_own():
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [float("nan"), 1.0]])
    units = stream.unit(vectors)
    assert units[0].tolist() == [0.0, 0.0]
    assert units[1].tolist() == pytest.approx([0.6, 0.8])
    assert units[2].isnan().all()


def test_stored_files_are_never_written_to(tmp_path, arrays):
    reader = make_store(tmp_path, arrays, 8)
    list(stream.apply(reader, ["right"], lambda _, parts: parts[0].zero_(), normalize_parts=True))
    np.testing.assert_array_equal(StoreReader.open(reader.folder).column("right"), arrays["right"])


def test_a_damaged_block_stops_the_stream(tmp_path, arrays):
    reader = make_store(tmp_path, arrays, 8)
    path = sorted(reader.folder.glob("block-*"))[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    seen = []
    with pytest.raises(StorageError, match="block-000001"):
        for part, _ in stream.apply(reader, list(arrays), copied, size=8):
            seen.append(part)
    assert slice(8, 16) not in seen


def test_a_stream_may_be_left_early(tmp_path, arrays):
    reader = make_store(tmp_path, arrays, 2)
    part, first = next(stream.apply(reader, ["left"], copied, size=3))
    assert part == slice(0, 3) and len(first) == 3


@pytest.mark.bits
@pytest.mark.parametrize("threads", [1, 2])
def test_order_bits_and_number_of_threads_stay_as_they_are(tmp_path, threads, set_threads):
    vectors = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
    reader = make_store(tmp_path, {"v": vectors}, 50)
    slow_start = {0: 0.2}  # the first chunk is done last, and still comes first

    def product(part, parts):
        time.sleep(slow_start.get(part.start, 0))
        return (parts[0] @ torch.from_numpy(vectors[0])).numpy()

    set_threads(threads)
    streamed = list(stream.apply(reader, ["v"], product, size=16))
    assert torch.get_num_threads() == threads
    set_threads(1)
    assert [part.start for part, _ in streamed] == list(range(0, 300, 16))
    for part, products in streamed:
        alone = torch.from_numpy(vectors[part]) @ torch.from_numpy(vectors[0])
        assert torch.equal(torch.from_numpy(products), alone)


@pytest.mark.bits
@pytest.mark.parametrize("shape", [(8192,), (8192, 300)])
def test_cosines_are_the_same_bits_for_one_and_two_threads(tmp_path, shape, set_threads):
    """At the width of the largest proxies, in chunks; a product outside them has no such promise.

    There the threads may share out the 8192 products that make a sum. It walks up to about 90 (the
    root of their number), each addition rounds it by 2^-24 of that, and 8192 such errors walk 90
    times as far: 5e-4, or 5e-6 of what is divided by the row's length, 90 again.
    """
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(2 * stream.CHUNK + 7, 8192)).astype(np.float32)
    columns = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    reader = make_store(tmp_path, {"v": vectors}, 100)
    streamed, whole = [], []
    for n_threads in (1, 2):
        set_threads(n_threads)
        apply = stream.apply(reader, ["v"], lambda _, parts: stream.cosines(parts, columns))
        streamed.append(np.concatenate([cosines for _, cosines in apply]))
        whole.append(stream.cosines([torch.from_numpy(vectors)], columns))
    assert streamed[0].tobytes() == streamed[1].tobytes()
    for cosines in whole:
        np.testing.assert_allclose(cosines, streamed[0], rtol=0, atol=1e-5)


def test_an_error_in_the_function_reaches_the_caller(tmp_path, arrays):
    reader = make_store(tmp_path, arrays, 8)
    with pytest.raises(ZeroDivisionError):
        list(stream.apply(reader, ["left"], lambda part, parts: 1 // (part.start - 8), size=8))


@pytest.mark.parametrize("shape", [(18,), (18, 5)])
def test_products_and_cosines_do_not_depend_on_the_split_into_columns(arrays, shape):
    columns = torch.from_numpy(np.random.default_rng(1).normal(size=shape)).float()
    parts = [torch.from_numpy(a).float() for a in arrays.values()]
    whole = torch.cat(parts, dim=1)
    torch.testing.assert_close(stream.products(parts, columns), whole @ columns)
    torch.testing.assert_close(stream.norms(parts), whole.norm(dim=1))
    unit_rows = whole.double() / whole.double().norm(dim=1, keepdim=True)
    exact = unit_rows @ columns.double()
    np.testing.assert_allclose(stream.cosines(parts, columns), exact, atol=1e-6)


def test_cosines_of_rows_without_a_direction_are_nan():
    vectors = torch.tensor([[0.0, 0.0], [3.0, 4.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    found = stream.cosines([vectors], torch.tensor([1.0, 0.0]))
    np.testing.assert_array_equal(np.isnan(found), [True, False, True, True])
    assert found[1] == pytest.approx(0.6)
