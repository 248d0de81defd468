"""Samples that cannot be scored, and memory that does not suffice."""

import json

import numpy as np
import pytest
import torch

from llava.errors import DataError
from llava.images import open_image
from llava.vlm import load_vlm
from selection.extract.loop import allowed_bad, is_out_of_memory, non_finite
from selection.signals.forward import Forward
from tests.extraction import Forbidden, N, World, assert_same, columns, extract


def too_much_memory():
    """A real allocation that no machine can give: 8 exabytes."""
    return torch.empty(2**60)


class Small(Forward):
    """A machine whose memory holds `room` tokens."""

    room = 0
    attempts = 0

    def compute(self, proxy, items):
        type(self).attempts += 1
        if sum(item.n_tokens for item in items) > self.room:
            too_much_memory()
        return super().compute(proxy, items)


def test_out_of_memory_halves_the_batch(world, reference, tmp_path):
    class Half(Small):
        room = 700

    found = world.extract(tmp_path, Half(), batch_size=32, block_size=6)
    assert not found.bad
    assert_same(reference, found)


def test_later_batches_keep_the_smaller_size(world, tmp_path):
    """Once a batch did not fit, none is tried at that size again."""

    class Half(Small):
        room = 300

    world.extract(tmp_path, Half(), batch_size=32, block_size=N)
    n_needed = len(world.pool)
    assert Half.attempts <= n_needed + 5  # five halvings from 32 to 1


def test_sample_too_large_for_memory_is_listed(world, reference, tmp_path):
    lengths = reference_lengths(world)

    class Quarter(Small):
        room = int(np.quantile(lengths, 0.8))

    found = world.extract(tmp_path, Quarter(), block_size=6)
    expected = np.flatnonzero(lengths > Quarter.room)
    assert [note["row"] for note in found.bad] == expected.tolist()
    assert all("out of memory" in note["reason"] for note in found.bad)
    assert np.isnan(found.column("nll_mean")[expected]).all()
    assert_same(reference, found, np.flatnonzero(lengths <= Quarter.room))


def reference_lengths(world) -> np.ndarray:
    lengths = []
    for row in range(len(world.pool)):
        record = world.pool.record(row)
        image = open_image(world.images, record.image) if record.image else None
        lengths.append(world.proxy.prepare(record, image).n_tokens)
    return np.array(lengths)


def test_other_errors_are_not_taken_for_lack_of_memory(world, tmp_path):
    class Broken(Forward):
        def compute(self, proxy, items):
            raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        world.extract(tmp_path, Broken())


def test_memory_errors_are_recognised():
    with pytest.raises(RuntimeError) as caught:
        too_much_memory()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.fixture
def damaged(world, tmp_path):
    """The world with eight samples spoilt, each in its own way: reasons by row."""
    records = json.loads(world.pool_path.read_text())
    images = tmp_path / "images"
    images.mkdir()
    for path in world.images.iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "1.png").unlink()
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:60])
    (images / "3.png").write_text("<html>not found</html>")
    records[4]["conversations"][1]["from"] = "teacher"
    records[5]["conversations"][0]["value"] = "red " * 300 + "<image>"
    records[6]["conversations"] = records[6]["conversations"][:1]
    records[7]["image"] = "../model/config.json"
    records[8]["image"] = ["8.png"]
    path = tmp_path / "pool.json"
    path.write_text(json.dumps(records))
    reasons = {
        1: "no such file",
        2: "truncated or corrupt",
        3: "not an image",
        4: "teacher",
        5: "no answer token|image ends",
        6: "no answer token",
        7: "leaves the image folder",
        8: "$.image",
    }
    return World(world.model, path, images), reasons


def test_unusable_samples_are_listed_and_harm_no_other(damaged, reference, tmp_path):
    world, reasons = damaged
    found = world.extract(tmp_path / "store", block_size=6)
    notes = {note["row"]: note for note in found.bad}
    assert notes.keys() == reasons.keys()
    for row, reason in reasons.items():
        assert any(part in notes[row]["reason"] for part in reason.split("|")), notes[row]
        assert notes[row]["uid"] == world.pool.uid(row)
        for name, array in columns(found).items():
            assert name == "n_tokens" or np.isnan(array[row]).all(), name
    assert notes[2]["image"] == "2.png"
    good = [row for row in range(N) if row not in reasons]
    assert_same(reference, found, good)


def test_too_many_unusable_samples_stop_the_run(damaged, tmp_path):
    """Eight of 40 are bad; the run stops, says which, and a larger limit does not compute again."""
    world, reasons = damaged
    with pytest.raises(DataError) as caught:
        world.extract(tmp_path / "store", max_bad=0.05, block_size=6)
    assert caught.value.exit_code == 65
    assert "row 1:" in str(caught.value) and "--max-bad" in str(caught.value)
    world.extract(tmp_path / "store", max_bad=0.2)
    assert len(world.extract(tmp_path / "store", Forbidden(), max_bad=0.2).bad) == len(reasons)
    with pytest.raises(DataError, match="8 samples cannot be scored, 2 may"):
        world.extract(tmp_path / "store", Forbidden(), max_bad=0.05)


def test_one_unusable_sample_always_may_be():
    assert [allowed_bad(n, 0.001) for n in (1, 999, 2000, 665_298)] == [1, 1, 2, 665]
    assert allowed_bad(100, 0.0) == 1


def test_non_finite_numbers_are_listed(world, reference, tmp_path):
    """A head that gives NaN for one answer token: only samples that ask for it are listed."""
    token = int(world.proxy.loaded.tokenizer.encode("triangle")[0][-1])
    weight = world.proxy.head.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[token] = torch.nan
    try:
        found = world.extract(tmp_path, Uncached())
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert len(found.bad) == N  # the softmax of every answer sees the broken row
    assert all("nll_sum is not finite" in note["reason"] for note in found.bad)


class Uncached(Forward):
    """A Forward whose store no other test reads."""


def test_state_that_float16_cannot_hold_is_listed(world, tmp_path):
    proxy = load_vlm(world.model, dtype="bfloat16")
    with torch.no_grad():
        proxy.decoder.norm.weight.mul_(3e5)
    rows = np.arange(8)
    found = extract(
        Forward(), proxy, world.pool, rows, tmp_path, world.images, max_bad=1.0, progress=False
    )
    assert len(found.bad) == 8
    assert "last_state is not finite in float16" in found.bad[0]["reason"]


def test_non_finite_names_row_and_column():
    found = {
        "state": np.array([[1.0, 2], [np.inf, 1], [3, 4]]),
        "gap": np.array([np.nan, 1, 2]),
        "n": np.array([1, 2, 3]),
    }
    assert non_finite(found) == {
        0: "gap is not finite in float64",
        1: "state is not finite in float64",
    }
    assert non_finite(found, may_be_nan=("gap",)) == {1: "state is not finite in float64"}
