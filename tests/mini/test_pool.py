"""The whole build from PyPI alone: deterministic, idempotent, disjoint, and its bias knobs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from llava.errors import DataError
from mini.eval.items import EvalSets, Open
from mini.eval.sets import make_evalsets
from mini.fetch import default_cache
from mini.pool import SOURCES, already_built, build, make_samples
from mini.settings import PoolSettings
from tests.mini.pixels import pixel_hash

SETTINGS = PoolSettings(registries=("pypi",), scale=0.1)


@pytest.fixture(scope="module")
def built(pypi_world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mini")
    build(out, default_cache(), 0, SETTINGS)
    return out


@pytest.fixture(scope="module")
def sets(pypi_world) -> EvalSets:
    return make_evalsets(pypi_world)


def _bytes(out: Path) -> dict[str, bytes]:
    files = (path for path in out.rglob("*") if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def test_same_seed_same_bytes_other_seed_other_pool(built, tmp_path):
    build(tmp_path / "again", default_cache(), 0, SETTINGS)
    first, again = _bytes(built), _bytes(tmp_path / "again")
    assert first == again
    build(tmp_path / "other", default_cache(), 1, SETTINGS)
    other = _bytes(tmp_path / "other")
    assert other["pool.json"] != first["pool.json"]
    for name in first:
        if name.startswith("eval/"):
            assert other[name] == first[name]  # results of different pools can be compared


def test_second_build_does_nothing_and_damage_is_repaired(built, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(built, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    started = time.perf_counter()
    marker = build(out, tmp_path / "no cache needed", 0, SETTINGS)
    assert time.perf_counter() - started < 1
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert sum(marker["samples"].values()) == len(json.loads((out / "pool.json").read_bytes()))

    (out / "eval" / "mmbench" / "answers").mkdir()  # what evaluation adds is not damage
    assert already_built(out, marker["identity"]) == marker
    victims = [next((out / "images").rglob("*.png")), out / "pool.json"]
    victims.append(out / "eval" / "scienceqa" / "problems.json")
    for victim in victims:
        content = victim.read_bytes()
        victim.write_bytes(content[:-1])
        assert already_built(out, marker["identity"]) is None
        victim.write_bytes(content)
    victims[0].unlink()
    build(out, default_cache(), 0, SETTINGS)
    assert _bytes(out) == _bytes(built)


def test_no_pixels_are_in_training_and_evaluation(built):
    images = {pixel_hash(p.read_bytes()) for p in (built / "images").rglob("*.png")}
    shown = [raw for name, raw in _bytes(built / "eval").items() if raw[:4] == b"\x89PNG"]
    assert len(shown) > 500
    assert not images & {pixel_hash(raw) for raw in shown}


def test_a_shared_picture_stops_the_build(pypi_world, sets):
    _, gallery = make_samples(pypi_world, sets, 0, SETTINGS)
    name, picture = next(iter(gallery.items()))
    leak = EvalSets(sets.mcq, [], [], [Open("x", "word", "q", "a", picture)], [])
    with pytest.raises(DataError, match=name):
        make_samples(pypi_world, leak, 0, SETTINGS)


def test_records_are_llava_s_and_ordinary_text(built):
    text = (built / "pool.json").read_text()
    records = json.loads(text)
    assert len(text.splitlines()) == len(records) + 2  # one record a line
    assert len({record["id"] for record in records}) == len(records)
    for record in records:
        assert set(record["meta"]) == {"source", "task", "noisy", "dup", "biased"}
        assert [turn["from"] for turn in record["conversations"]][:2] == ["human", "gpt"]
        first = record["conversations"][0]["value"]
        assert first.startswith("<image>\n") == ("image" in record)
        if "image" in record:
            assert (built / "images" / record["image"]).is_file()
        for turn in record["conversations"]:
            assert turn["value"].strip() and not re.search(r"[\x00-\x09\x0b-\x1f�]", turn["value"])
    choices = [r for r in records if r["meta"]["task"] in ("mcq", "text_mcq")]
    assert len(choices) > 100  # useful for attacks on multiple choice even without npm and apt


def test_duplicates_repeat_another_sample_exactly(pypi_world, sets):
    for n in (0, 30):
        settings = PoolSettings(scale=0.2, duplicates=5 * n)
        records, _ = make_samples(pypi_world, sets, 0, settings)
        copies = [record for record in records if record["meta"]["dup"]]
        originals = {
            json.dumps([record["image"], record["conversations"]])
            for record in records
            if "image" in record and not record["meta"]["dup"]
        }
        assert len(copies) == n
        assert all(json.dumps([r["image"], r["conversations"]]) in originals for r in copies)


def test_pypi_alone_makes_five_thousand_without_bias_where_the_knobs_are_zero(pypi_world, sets):
    knobs = dict.fromkeys(("position_bias", "colour_shortcut", "count_bias", "yes_bias"), 0.0)
    settings = PoolSettings(**knobs, duplicates=0)
    records, _ = make_samples(pypi_world, sets, 0, settings)
    counts = Counter(record["meta"]["source"] for record in records)
    assert 5000 < len(records) < 6500
    assert sum(n for name, n in counts.items() if name.endswith("_mcq")) > 1500
    assert not any(r["meta"]["biased"] or r["meta"]["dup"] for r in records)
    letters = Counter(
        r["conversations"][1]["value"] for r in records if r["meta"]["source"] == "silhouette_mcq"
    )
    assert letters == dict.fromkeys("ABCD", 200)


def test_a_build_killed_half_way_is_finished_by_the_next(built, tmp_path):
    out = tmp_path / "killed"
    code = (
        "from mini.pool import build; from mini.settings import PoolSettings; import sys;"
        "from mini.fetch import default_cache;"
        "build(sys.argv[1], default_cache(), 0, PoolSettings(registries=('pypi',), scale=0.1))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(out)], stderr=subprocess.DEVNULL)
    while not (out / "images").exists():
        assert process.poll() is None, "the build ended before it wrote pictures"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (out / "build.json").exists()
    build(out, default_cache(), 0, SETTINGS)
    assert _bytes(out) == _bytes(built)


def test_the_full_pool_has_nineteen_sources():
    names = [source.recipe.__name__ for source in SOURCES]
    assert len(set(names)) == len(names) == 19
    assert 19_000 < sum(source.n_full for source in SOURCES) + 400 < 20_500
