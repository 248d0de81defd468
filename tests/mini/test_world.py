"""The division of pictures into what trains and what evaluates."""

from __future__ import annotations

from dataclasses import replace

from mini.clipart import ClipArt
from mini.eval.sets import make_evalsets
from mini.pool import SOURCES, make_samples
from mini.settings import PoolSettings
from mini.world import _divide_clipart, target_emoji


def test_equal_drawings_are_kept_once_and_evaluation_keeps_them():
    art = ClipArt("a", "food", "x", (), b"", evaluation=False)
    arts = [art, replace(art, path="b"), replace(art, path="c", evaluation=True)]
    arts += [replace(art, path="d"), replace(art, path="e"), replace(art, path="f")]
    pictures = {"clipart/a": b"1", "clipart/b": b"1", "clipart/c": b"1"}
    pictures |= {"clipart/d": b"2", "clipart/e": b"2"}  # f could not be drawn
    split = _divide_clipart(arts, pictures)
    assert [a.path for a, _ in split["evaluation"]] == ["c"]
    assert [a.path for a, _ in split["train"]] == ["d"]


def test_shapes_of_both_parts_are_there(pypi_world):
    train, held_out = pypi_world.shapes["train"], pypi_world.shapes["evaluation"]
    assert {number for _, _, number in train.questions} == set(train.pictures)
    assert len(train.pictures) == 1500 and len(held_out.pictures) == 400
    assert not set(train.pictures.values()) & set(held_out.pictures.values())
    assert pypi_world.emoji == pypi_world.flags == pypi_world.clipart.get("x", {}) == {}


def test_split_rules_hold_in_the_full_world(full_world):
    """No flat drawing of an evaluation concept, nothing of an unseen one, no drawing twice."""
    roles = {emoji.hexcode: emoji.role for emoji in full_world.concepts.emoji}
    targets = {emoji.hexcode for emoji in target_emoji(full_world.concepts)}
    for code, style in full_world.emoji:
        assert (style == "3d") <= (roles[code] != "train" or code in targets)
        assert (style == "flat") <= (roles[code] == "train")
        assert (style != "3d") <= (roles[code] != "unseen")
    held_out = {key: p for key, p in full_world.emoji.items() if key[1] == "3d"}
    assert len(held_out) == 750 + len(targets)
    train = {p for key, p in full_world.emoji.items() if key not in held_out}
    train |= {picture for _, picture in full_world.clipart["train"]}
    train |= set(full_world.flags.values())
    drawings = [p for part in full_world.clipart.values() for _, p in part]
    assert len(set(drawings)) == len(drawings) > 1900
    shown = set(held_out.values()) | {p for _, p in full_world.clipart["evaluation"]}
    assert not train & (shown | set(full_world.waving.values()))
    words = full_world.concepts.words
    glosses = [{w.gloss for w in words if w.evaluation == side} for side in (True, False)]
    assert not glosses[0] & glosses[1]


def test_a_full_pool_of_every_source_and_its_evaluation_sets(full_world):
    sets = make_evalsets(full_world)
    assert [len(s) for s in (sets.mcq, sets.mixed, sets.yesno, sets.unseen)] == [993, 679, 600, 150]
    assert len(sets.open_ended) == 1000
    records, _ = make_samples(full_world, sets, 0, PoolSettings(scale=0.05))
    assert len({record["meta"]["source"] for record in records}) == len(SOURCES)
