"""Clip art: the author's words become ordinary ones, unsuitable drawings stay out."""

from __future__ import annotations

import pytest

from mini.clipart import CATEGORIES, _suitable, describe, load_clipart

SVG = """<svg><title>no</title><metadata><rdf:RDF><cc:Work rdf:about="">
<dc:title>{}</dc:title><dc:subject><rdf:Bag>{}</rdf:Bag></dc:subject>
</cc:Work></rdf:RDF></metadata></svg>"""


def _described(title: str, *keywords: str):
    return describe(SVG.format(title, "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)))


@pytest.mark.parametrize(
    ("raw", "title"),
    [
        ("Acoustic Guitar", "acoustic guitar"),
        ("Clipart by Nicu Buculei - red_ball2", "red ball"),
        ("Tom &amp; Co 3", ""),
        ("Violin (Colour)", "violin"),
        ("Lemon SVG theme", ""),
        ("R16 sibmission", ""),
        ("Albero è verde", ""),
        ("", ""),
    ],
)
def test_titles(raw, title):
    assert _described(raw)[0] == title


def test_keywords_are_words_and_not_filing():
    assert _described("x", "Music", "", "hash", "0x9c7e", "music", "big_cat", "unsorted")[1] == (
        "music",
        "big cat",
    )
    assert describe("<svg/>") == ("", ())


def test_folders():
    def name(path: str) -> bool:
        return _suitable(f"usr/share/openclipart/svg/{path}")

    assert name("animals/birds/dove.svg") and name("food/pie.svg")
    assert not name("people/man.svg")
    assert not name("animals/birds/dove.txt")
    assert not name("geography/flags/asia/x.svg")
    assert not name("recreation/games/cards/white/x.svg")


def test_library(sources):
    if not sources.has("clipart"):
        pytest.skip(f"needs openclipart-svg: {sources.report()}")
    arts = load_clipart(sources)
    assert len(arts) > 2000 and {art.category for art in arts} <= set(CATEGORIES.values())
    assert [a.path for a in arts] == sorted(a.path for a in arts)
    assert all(art.title or len(art.keywords) > 1 for art in arts)
    assert all(art.title.isascii() and "people/" not in art.path for art in arts)
    assert 0.1 < sum(art.evaluation for art in arts) / len(arts) < 0.2
