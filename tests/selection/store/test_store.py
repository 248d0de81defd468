"""Laws of the store: exact arrays, damage found and repaired, other inputs refused."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from llava import files
from llava.errors import StorageError
from llava.runs import differences
from selection.store import key as key_module
from selection.store.files import Block, block_path, encode_index, read_index
from selection.store.key import Column, StoreKey, fingerprint
from selection.store.store import StoreReader, StoreWriter, is_complete
from tests.faults import DAMAGE, corrupt, faulty_os, flip_bit, in_child, snapshot, tiny_disk

COLUMNS = [
    Column("state", (5,), "float16"),
    Column("loss", (), "float32"),
    Column("n", (), "int64"),
]
IDENTITY = {"model": {"sha256": "abc", "dtype": "float32"}, "pool": "p", "settings": {"k": [1, 2]}}
ROWS = np.random.default_rng(0).permutation(100)[:23]


def numbers(rows: np.ndarray) -> dict[str, np.ndarray]:
    """What a model would say about these pool rows: a function of the row alone."""
    state = np.sin(np.outer(rows, np.arange(1, 6))).astype(np.float16)
    return {"state": state, "loss": np.cos(rows).astype(np.float32), "n": rows * 3}


def bad_of(rows: np.ndarray) -> list[dict]:
    return [{"row": int(r), "uid": f"u{r}", "reason": "no file é"} for r in rows if r % 7 == 0]


def begin(root, rows=ROWS, identity=IDENTITY, block_size=4, rank=0) -> StoreWriter:
    return StoreWriter.open(root, StoreKey("forward", identity, rows, COLUMNS), block_size, rank)


def fill(writer: StoreWriter, indices=None) -> StoreWriter:
    for i in writer.missing_blocks() if indices is None else indices:
        rows = writer.block_rows(i)
        writer.write_block(i, numbers(rows), bad_of(rows))
    return writer


def complete(root, **options):
    writer = fill(begin(root, **options))
    writer.finish()
    return writer.folder


@pytest.fixture
def whole(tmp_path):
    """A finished store, and its bytes."""
    folder = complete(tmp_path)
    return folder, snapshot(folder)


@pytest.mark.parametrize("block_size", [1, 4, 23, 1000])
def test_reader_returns_what_was_written(tmp_path, block_size):
    reader = StoreReader.open(complete(tmp_path, block_size=block_size))
    expected = numbers(ROWS)
    assert len(reader) == 23 and np.array_equal(reader.rows, ROWS)
    assert reader.bad == bad_of(ROWS)
    for name, array in expected.items():
        column = reader.column(name)
        assert column.dtype == array.dtype and np.array_equal(column, array)
        positions = [22, 0, 0, 7, 4, 3]
        assert np.array_equal(reader.take(name, positions), array[positions])
    assert reader.take("state", []).shape == (0, 5)
    seen = np.zeros(23, int)
    for part, arrays in reader.blocks(["loss", "state"]):
        seen[part] += 1
        assert all(np.array_equal(arrays[name], expected[name][part]) for name in arrays)
    assert (seen == 1).all()
    assert sum(len(array) for _, array in reader.blocks("n")) == 23


def test_rows_without_numbers_are_told_in_store_order(tmp_path):
    rows = np.array([3, 14, 7, 5, 21])
    reader = StoreReader.open(complete(tmp_path, rows=rows, block_size=2))
    assert reader.bad == bad_of(rows) and reader.bad_rows.tolist() == [14, 7, 21]
    assert StoreReader.open(complete(tmp_path, rows=rows[[0, 3]])).bad_rows.dtype == np.int64


def test_views_are_read_only_and_outlive_the_reader(whole):
    _, array = next(StoreReader.open(whole[0]).blocks("state"))
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0
    assert np.array_equal(array, numbers(ROWS)["state"][:4])


def test_store_without_rows(tmp_path):
    reader = StoreReader.open(complete(tmp_path, rows=ROWS[:0]))
    assert len(reader) == 0 and len(reader.rows) == 0 and reader.column("state").shape == (0, 5)


def test_wrong_arrays_are_refused(tmp_path):
    writer = begin(tmp_path)
    good = numbers(writer.block_rows(0))
    for wrong in (
        {name: array for name, array in good.items() if name != "n"},
        good | {"extra": good["n"]},
        good | {"loss": good["loss"].astype(np.float64)},
        good | {"state": good["state"][:3]},
    ):
        with pytest.raises(ValueError, match="expected"):
            writer.write_block(0, wrong)
    with pytest.raises(ValueError, match="cannot be stored"):
        Column("x", (), "complex64")
    with pytest.raises(KeyError, match="no column"):
        StoreReader.open(complete(tmp_path)).take("nothing", [0])
    with pytest.raises(IndexError):
        StoreReader.open(complete(tmp_path)).take("n", [-1])


def test_order_and_number_of_writers_do_not_change_a_byte(tmp_path, whole):
    first = begin(tmp_path / "b", rank=0)
    second = begin(tmp_path / "b", rank=1)
    missing = first.missing_blocks()
    fill(second, missing[::-2])
    fill(first, [i for i in missing if i not in missing[::-2]])
    first.finish()
    assert snapshot(first.folder) == whole[1]


def test_resumed_store_keeps_its_block_size_and_its_bytes(tmp_path, whole):
    fill(begin(tmp_path / "b"), [0, 3])
    resumed = begin(tmp_path / "b", block_size=10)
    assert resumed.block_size == 4 and resumed.missing_blocks() == [1, 2, 4, 5]
    fill(resumed).finish()
    assert snapshot(resumed.folder) == whole[1]
    again = begin(tmp_path / "b", block_size=10)  # a finished store, opened for writing
    assert again.block_size == 4 and again.missing_blocks() == []
    again.finish()
    assert snapshot(again.folder) == whole[1]


def test_unfinished_store_is_not_read(tmp_path):
    writer = fill(begin(tmp_path), [0, 1, 2])
    with pytest.raises(StorageError, match="manifest.json is absent"):
        StoreReader.open(writer.folder)
    with pytest.raises(StorageError, match=r"3 of 6 blocks are missing \(3, 4, 5\)"):
        writer.finish()
    assert not is_complete(writer.folder)
    fill(writer).finish()
    assert is_complete(writer.folder)


def test_store_left_untidy_is_not_complete(tmp_path, whole):
    folder, bytes_ = whole
    (folder / "journal-0-1.jsonl").touch()
    assert not is_complete(folder)
    begin(tmp_path).finish()
    assert is_complete(folder) and snapshot(folder) == bytes_


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_detected_named_and_repaired(tmp_path, whole, kind):
    """P13: no damaged number is ever returned, and only the damaged blocks are recomputed."""
    folder, bytes_ = whole
    corrupt(sorted(folder.glob("block-*")), kind)
    with pytest.raises(StorageError, match="block-00000[12].*only this block is computed"):
        StoreReader.open(folder).column("state")
    with pytest.raises(StorageError, match="block-00000[12]"):
        StoreReader.open(folder).take("loss", np.arange(4, 12))
    writer = begin(tmp_path)
    assert writer.missing_blocks() == ([1, 2] if kind.startswith("swap") else [1])
    fill(writer).finish()
    repaired = snapshot(folder)
    repaired.pop("block-000099.safetensors", None)  # a renamed block is left to its renamer
    assert repaired == bytes_


def test_sound_blocks_stay_readable_beside_a_damaged_one(whole):
    folder = whole[0]
    flip_bit(block_path(folder, 1), 300)
    reader = StoreReader.open(folder)
    assert np.array_equal(reader.take("n", [0, 22]), ROWS[[0, 22]] * 3)
    with pytest.raises(StorageError, match="block-000001"):
        reader.take("n", [4])


def test_every_byte_of_the_manifest_is_guarded(tmp_path, whole):
    """A changed manifest is refused; resuming recomputes at most the block whose line it was."""
    folder, bytes_ = whole
    path = folder / "manifest.json"
    for at in range(len(bytes_["manifest.json"])):
        flip_bit(path, at, at % 7)
        with pytest.raises(StorageError, match="manifest.json is damaged or edited"):
            StoreReader.open(folder)
        if at % 97 == 0:
            writer = begin(tmp_path)
            assert len(writer.missing_blocks()) <= 1
            fill(writer).finish()
            assert snapshot(folder) == bytes_
        path.write_bytes(bytes_["manifest.json"])


def test_a_changed_reason_in_the_manifest_is_not_sealed_again(tmp_path):
    """The block file holds its list of samples without numbers too, and the two must agree."""
    rows = np.array([3, 14, 7, 5, 21])
    folder = complete(tmp_path, rows=rows, block_size=2)
    before, path = snapshot(folder), folder / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"u14"', b'"u15"'))
    writer = begin(tmp_path, rows=rows, block_size=2)
    assert writer.missing_blocks() == [0]
    fill(writer).finish()
    assert snapshot(folder) == before


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.5, 0.9])
def test_cut_manifest_is_refused(whole, keep):
    path = whole[0] / "manifest.json"
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(StorageError, match="manifest.json is damaged"):
        StoreReader.open(whole[0])


def test_journal_cut_anywhere_costs_at_most_the_last_block(tmp_path, whole):
    writer = fill(begin(tmp_path / "b"), [0, 1])
    (journal,) = writer.folder.glob("journal-*.jsonl")
    text = journal.read_bytes()
    second = text.index(b"\n\n") + 1
    for cut in range(len(text)):
        journal.write_bytes(text[:cut])
        missing = begin(tmp_path / "b").missing_blocks()
        assert missing[0] == (0 if cut < second - 1 else 1 if cut < len(text) - 1 else 2)
        assert missing[-4:] == [2, 3, 4, 5]
    journal.write_bytes(text[:-20])
    fill(begin(tmp_path / "b")).finish()  # appends to the journal that was cut
    assert snapshot(writer.folder) == whole[1]


def test_older_manifest_does_not_vouch_for_newer_blocks(tmp_path, whole):
    folder, bytes_ = whole
    block_path(folder, 2).unlink()
    writer = begin(tmp_path)
    arrays = numbers(writer.block_rows(2))
    arrays["loss"] += 1  # as another machine might compute it
    writer.write_block(2, arrays)
    writer.finish()
    StoreReader.open(folder).column("loss")
    (folder / "manifest.json").write_bytes(bytes_["manifest.json"])
    with pytest.raises(StorageError, match="block-000002"):
        StoreReader.open(folder).column("loss")


def test_blocks_of_another_layout_are_not_taken(tmp_path, whole):
    """With the manifest lost and another block size, a block's bytes agree but not its rows."""
    flip_bit(whole[0] / "manifest.json", 0)
    writer = begin(tmp_path, block_size=3)
    assert writer.missing_blocks() == list(range(8))
    fill(writer).finish()
    assert np.array_equal(StoreReader.open(whole[0]).column("n"), ROWS * 3)


def test_listing_cannot_vouch_for_a_foreign_block(tmp_path, whole):
    """Blocks and journal lines copied from elsewhere agree with each other, not with the store."""
    other = fill(begin(tmp_path / "b", identity={"pool": "q"}))
    mine = begin(tmp_path / "c")
    for path in other.folder.iterdir():
        if path.name != "layout.json":
            shutil.copy(path, mine.folder)
    assert mine.missing_blocks() == list(range(6))
    ours = read_index(whole[0] / "manifest.json")["blocks"][1]
    for i in range(2):  # block 1 under the name of block 0 and under its own
        shutil.copy(block_path(whole[0], 1), block_path(mine.folder, i))
        line = msgspec.json.encode(msgspec.structs.replace(ours, block=i))
        files.append_line(mine.folder / "journal-9-9.jsonl", line)
    assert mine.missing_blocks() == [0, 2, 3, 4, 5]
    with pytest.raises(StorageError, match="is block 1 of store"):
        Block(mine.folder, msgspec.structs.replace(ours, block=0)).check(mine.key.fingerprint)


def test_two_writers_of_one_block_leave_a_sound_store(tmp_path):
    """A requeued job may meet the old one: whichever file stays is the one listed."""
    first = fill(begin(tmp_path, rank=0), range(6))
    second = begin(tmp_path, rank=1)
    arrays = numbers(second.block_rows(3))
    arrays["loss"] += 1
    second.write_block(3, arrays)
    first.finish()
    assert np.array_equal(StoreReader.open(first.folder).take("loss", [12]), arrays["loss"][:1])


def leaves(tree: dict, path=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


@pytest.mark.parametrize("path", leaves(IDENTITY), ids=".".join)
def test_other_inputs_never_share_a_store(tmp_path, path):
    """P10: each value of the identity leads elsewhere, and the difference is named."""
    other = copy.deepcopy(IDENTITY)
    inner = other
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = "changed"
    mine, theirs = begin(tmp_path), begin(tmp_path, identity=other)
    assert mine.folder != theirs.folder
    (line,) = differences(IDENTITY, other)
    assert line.startswith(".".join(path)) and line.endswith("-> changed")


def test_rows_columns_and_name_are_part_of_the_identity(tmp_path):
    base = StoreKey("forward", IDENTITY, ROWS, COLUMNS).folder(tmp_path)
    assert (
        StoreKey("forward", dict(reversed(IDENTITY.items())), ROWS, COLUMNS).folder(tmp_path)
        == base
    )
    others = [
        StoreKey("other", IDENTITY, ROWS, COLUMNS).folder(tmp_path),
        StoreKey("forward", IDENTITY, ROWS[::-1], COLUMNS).folder(tmp_path),
        StoreKey("forward", IDENTITY, ROWS[:-1], COLUMNS).folder(tmp_path),
        StoreKey("forward", IDENTITY, ROWS, COLUMNS[:2]).folder(tmp_path),
        StoreKey("forward", {**IDENTITY, "new": None}, ROWS, COLUMNS).folder(tmp_path),
    ]
    assert len({base, *others}) == 6


def test_schema_version_is_part_of_the_identity(tmp_path, monkeypatch):
    base = StoreKey("forward", IDENTITY, ROWS, COLUMNS).folder(tmp_path)
    monkeypatch.setattr(key_module, "SCHEMA", 2)
    assert StoreKey("forward", IDENTITY, ROWS, COLUMNS).folder(tmp_path) != base


def test_folder_that_holds_another_store_is_refused(tmp_path, whole):
    other = {**IDENTITY, "pool": "q"}
    target = StoreKey("forward", other, ROWS, COLUMNS).folder(tmp_path)
    shutil.copytree(whole[0], target)
    with pytest.raises(StorageError, match="holds other inputs .pool: p -> q."):
        begin(tmp_path, identity=other)
    with pytest.raises(StorageError, match=f"holds the store {whole[0].name}"):
        StoreReader.open(target)


def test_edited_identity_is_refused_even_with_a_new_checksum(whole):
    path = whole[0] / "manifest.json"
    index = read_index(path)
    index["identity"]["pool"] = "q"
    index["fingerprint"] = fingerprint(index["identity"])
    entries = index.pop("blocks")
    path.write_bytes(encode_index(index, entries))
    with pytest.raises(StorageError):
        StoreReader.open(whole[0])
    index["fingerprint"] = read_fingerprint = StoreKey(
        "forward", IDENTITY, ROWS, COLUMNS
    ).fingerprint
    path.write_bytes(encode_index(index, entries))
    assert whole[0].name.endswith(read_fingerprint[:16])
    with pytest.raises(StorageError):
        StoreReader.open(whole[0])


@pytest.mark.parametrize("fault", ["eio", "short", "kill"])
def test_fault_at_every_system_call_then_resume(tmp_path, fault):
    """P8: fail each write, sync, rename, ... in turn; the next run completes bit-identical."""
    rows = ROWS[:7]

    def work(root):
        fill(begin(root, rows=rows, block_size=3)).finish()

    with faulty_os() as shim:
        work(tmp_path / "reference")
    (reference,) = (tmp_path / "reference").iterdir()
    expected, n_failed = snapshot(reference), 0
    assert len(shim.calls) > 30 and {"write", "fsync", "replace"} <= set(shim.calls)
    for at in range(len(shim.calls)):
        root = tmp_path / str(at)
        n_failed += fails_at(work, root, at, fault)
        work(root)
        assert snapshot(root / reference.name) == expected, (at, shim.calls[at])
    # only clean-up may fail quietly
    assert n_failed == len(shim.calls) - (0 if fault == "kill" else shim.calls.count("unlink"))


def fails_at(work, root, at, fault) -> bool:
    def faulty():
        with faulty_os(at, {"eio": 5}.get(fault, fault)):
            work(root)

    if fault == "kill":
        return in_child(faulty) == -signal.SIGKILL
    try:
        faulty()
    except StorageError:
        return True
    return False


def test_full_disk_keeps_committed_blocks(tmp_path):
    """P12, on a real file system that fills up."""
    with tiny_disk(tmp_path / "disk", 64 * 1024) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(b"\0" * 36 * 1024)
        with pytest.raises(StorageError, match="disk is full: free some space") as caught:
            fill(begin(disk))
        assert caught.value.exit_code == 74
        missing = begin(disk).missing_blocks() if ballast.unlink() is None else []
        assert 0 < len(missing) < 6
        fill(begin(disk)).finish()
        (folder,) = disk.iterdir()
        assert snapshot(folder) == snapshot(complete(tmp_path / "reference"))


def test_import_is_light():
    """Ranks and crash tests start writers often: no model library comes with the store."""
    code = (
        "import sys, selection.store.store; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
