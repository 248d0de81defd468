"""Chunks of stored vectors: the same numbers, and the same bits, whatever the block size."""

import numpy as np
import pytest
import torch

from llava.errors import StorageError
from selection import stream
from selection.store import Column, StoreReader, StoreWriter

N, H = 23, 6


def make_store(folder, arrays, block_size):
    columns = [Column(name, a.shape[1:], a.dtype.name) for name, a in arrays.items()]
    rows = np.arange(len(next(iter(arrays.values()))))
    writer = StoreWriter.open(folder, "toy", {"block_size": block_size}, rows, columns, block_size)
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
def test_chunks_are_the_columns_side_by_side(tmp_path, arrays, block_size, size, normalize):
    parts = [a.astype(np.float64) for a in arrays.values()]
    if normalize:
        parts = [p / np.linalg.norm(p, axis=1, keepdims=True) for p in parts]
    reader = make_store(tmp_path, arrays, block_size)
    seen = [
        (part, v.clone()) for part, v in stream.chunks(reader, list(arrays), normalize, size=size)
    ]
    assert {len(v) for _, v in seen[:-1]} <= {min(size, N)}  # only the last chunk may be short
    assert [i for part, _ in seen for i in range(part.start, part.stop)] == list(range(N))
    whole = torch.cat([v for _, v in seen]).numpy()
    np.testing.assert_allclose(whole, np.hstack(parts), rtol=1e-6)


def test_take_gives_the_same_rows_as_chunks(tmp_path, arrays):
    reader = make_store(tmp_path, arrays, 4)
    whole = torch.cat([v.clone() for _, v in stream.chunks(reader, list(arrays), True)])
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
    for _, vectors in stream.chunks(reader, ["right"], normalize_parts=True):
        vectors.zero_()
    np.testing.assert_array_equal(StoreReader.open(reader.folder).column("right"), arrays["right"])


def test_a_damaged_block_stops_the_stream(tmp_path, arrays):
    reader = make_store(tmp_path, arrays, 8)
    path = sorted(reader.folder.glob("block-*"))[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    seen = []
    with pytest.raises(StorageError, match="block-000001"):
        for part, _ in stream.chunks(reader, list(arrays), size=8):
            seen.append(part)
    assert seen == [slice(0, 8)]


def test_a_stream_may_be_left_early(tmp_path, arrays):
    reader = make_store(tmp_path, arrays, 2)
    first = next(stream.chunks(reader, ["left"], size=3))
    assert first[0] == slice(0, 3)
