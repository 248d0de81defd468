"""A pool that has grown costs its new samples only, and its store equals a fresh one."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

from selection.pool.pool import Pool
from selection.signals.forward import Forward
from selection.store.reuse import UIDS
from tests.extraction import N, assert_same
from tests.selection.test_run import snapshot

SEEN: list[int] = []


@dataclass(frozen=True)
class Counting(Forward):
    """Notes in SEEN which rows it prepares."""

    def prepare(self, proxy, sample):
        SEEN.append(sample.row)
        return super().prepare(proxy, sample)


@pytest.fixture
def records(world):
    return json.loads(world.pool_path.read_text())


@pytest.fixture
def extracted(world, tmp_path):
    """Extract from a pool of the given records; returns the reader and the rows computed."""

    def run(records, store="store", **options):
        path = tmp_path / "pool.json"
        path.write_text(json.dumps(records))
        pool, SEEN[:] = Pool.open(path), []
        own = dict(world.__dict__)
        world.pool = pool
        try:
            return world.extract(tmp_path / store, Counting(), block_size=7, **options), SEEN[:]
        finally:
            world.__dict__.update(own)

    return run


def test_added_samples_alone_are_computed(extracted, records, tmp_path):
    _, first = extracted(records[:25])
    assert first == list(range(25))
    grown, computed = extracted(records)
    assert computed == list(range(25, N))
    fresh, everything = extracted(records, store="fresh")
    assert everything == list(range(N))
    assert_same(grown, fresh)
    assert snapshot(grown.folder) == snapshot(fresh.folder)


def test_order_and_place_do_not_matter(extracted, records):
    extracted(records[10:30])
    order = np.random.default_rng(0).permutation(N)
    moved, computed = extracted([records[i] for i in order])
    assert computed == [row for row, i in enumerate(order) if not 10 <= i < 30]
    fresh, _ = extracted([records[i] for i in order], store="fresh")
    assert_same(moved, fresh)


def test_several_stores_give_what_they_have(extracted, records):
    extracted(records[:10])
    extracted(records[30:])
    assert extracted(records)[1] == list(range(10, 30))
    assert extracted(records[5:35])[1] == []


def test_the_same_sample_twice_is_one(extracted, records):
    extracted(records[:3])
    assert extracted([records[0], *records[:4], records[0]])[1] == [4]


def test_another_model_setting_or_schema_is_computed_anew(extracted, records, world, monkeypatch):
    reader, _ = extracted(records[:10])
    manifest = json.loads((reader.folder / "manifest.json").read_text())
    assert set(manifest["identity"]) >= {"proxy", "settings", "schema", "columns"}
    for own in ({"settings": {"a": 1}, "schema": 1}, {"settings": {}, "schema": 2}):
        monkeypatch.setattr(Counting, "identity", lambda self, own=own: own)
        assert extracted(records[:12])[1] == list(range(12))
        monkeypatch.undo()
    proxy = dict(world.proxy.__dict__)
    world.proxy.fingerprint = "another"
    try:
        assert extracted(records[:12])[1] == list(range(12))
    finally:
        world.proxy.__dict__.update(proxy)


@pytest.mark.parametrize("damage", [b"", b"x" * 17, None])
def test_without_sound_uids_a_store_gives_nothing(extracted, records, damage):
    reader, _ = extracted(records[:10])
    path = reader.folder / UIDS
    path.unlink() if damage is None else path.write_bytes(damage)
    assert extracted(records[:12])[1] == list(range(12))


def test_what_could_not_be_scored_is_tried_again(extracted, records, world):
    broken = [{**records[0], "image": "missing.png"}, *records[1:5]]
    reader, _ = extracted(broken)
    assert [note["row"] for note in reader.bad] == [0]
    again, computed = extracted([*broken, records[6]])
    assert computed == [5] and [note["row"] for note in again.bad] == [0]
    assert_same(again, extracted([*broken, records[6]], store="fresh")[0])


def test_an_unfinished_store_gives_nothing(extracted, records):
    reader, _ = extracted(records[:10])
    (reader.folder / "manifest.json").unlink()
    assert extracted(records[:12])[1] == list(range(12))
