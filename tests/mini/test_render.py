"""Pictures: fitted, trimmed, cached, and the same bytes for the same pixels."""

from __future__ import annotations

import io
import random
import sqlite3

import numpy as np
import pytest
from PIL import Image

from llava.errors import StorageError
from mini.render import (
    SIZE,
    fit,
    frame,
    open_png,
    picture,
    png,
    rasterise,
    tile,
    write_word,
)
from tests.mini.pixels import pixel_hash

SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {0}">{1}</svg>'
DISC = '<circle cx="20" cy="20" r="9" fill="{}"/>'


def _disc(colour: str, page: int = 40) -> bytes:
    return SVG.format(page, DISC.format(colour)).encode()


def _ink(image: Image.Image) -> tuple[int, int]:
    rows, columns = np.where(np.asarray(image).min(axis=2) < 250)
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def test_svg_and_bitmaps_become_squares_on_white():
    image = open_png(picture(_disc("red")))
    assert image.size == (SIZE, SIZE)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert image.getpixel((48, 48)) == (255, 0, 0)
    wide = Image.new("RGBA", (200, 100), (0, 0, 255, 255))
    buffer = io.BytesIO()
    wide.save(buffer, "WEBP", lossless=True)
    assert _ink(open_png(picture(buffer.getvalue()))) == (48, 96)


def test_units_other_than_pixels_are_drawn():
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="30pt" height="3cm">{DISC}</svg>'
    assert picture(svg.format("green").encode()) is not None


def test_trim_enlarges_a_small_drawing_on_a_large_page():
    small = _disc("black", 200)  # 18 of 200 units: 9 pixels
    assert max(_ink(open_png(picture(small)))) < 12
    assert min(_ink(open_png(picture(small, trim=True)))) > 80
    assert picture(_disc("black"), trim=False) != picture(_disc("black"), trim=True)


def test_blank_and_broken_drawings_are_none():
    assert picture(_disc("white")) is None
    assert picture(_disc("none")) is None
    assert picture(b"<svg") is None


def test_rasterise_remembers_and_resumes(tmp_path):
    drawings = {str(i): _disc(f"#{i:06x}") for i in range(0, 400, 10)}
    drawings["white"] = _disc("white")
    alone = {name: picture(raw) for name, raw in drawings.items()}
    half = dict(list(drawings.items())[:9])
    assert rasterise(half, tmp_path) == {name: alone[name] for name in half}
    assert rasterise(drawings, tmp_path) == alone  # 32 and more: two processes

    def count() -> int:
        with sqlite3.connect(tmp_path / "pictures.sqlite") as database:
            return database.execute("select count(*) from picture").fetchone()[0]

    assert count() == len(drawings)
    with sqlite3.connect(tmp_path / "pictures.sqlite") as database:
        database.execute("update picture set png = x'00'")  # what is known is not drawn again
    assert set(rasterise(drawings, tmp_path).values()) == {b"\0"}
    assert rasterise(half, tmp_path, trim=True)["10"] != b"\0"  # another key


def test_damaged_cache_is_reported_with_the_remedy(tmp_path):
    (tmp_path / "pictures.sqlite").write_bytes(b"not a database, but long enough to be read" * 99)
    with pytest.raises(StorageError, match="delete this file"):
        rasterise({"a": _disc("red")}, tmp_path)


def test_equal_pixels_equal_bytes_and_hash():
    image = fit(Image.effect_noise((60, 90), 40))
    again = Image.fromarray(np.asarray(image))
    assert png(image) == png(again)
    assert pixel_hash(png(image)) == pixel_hash(png(again))
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    assert pixel_hash(buffer.getvalue()) == pixel_hash(png(image))  # whatever the format
    again.putpixel((3, 3), (1, 2, 3))
    assert pixel_hash(png(again)) != pixel_hash(png(image))


def test_frame_surrounds_and_tiles_keep_their_places():
    framed = frame(Image.new("RGB", (SIZE, SIZE), "white"), "#d03030")
    assert framed.getpixel((3, 48)) == framed.getpixel((48, 93)) == (0xD0, 0x30, 0x30)
    assert framed.getpixel((48, 48)) == (255, 255, 255)
    cell = Image.new("L", (28, 28), 0)
    tiled = np.asarray(tile([cell, cell], 3, 2, [0, 5]))
    assert tiled[20, 5].sum() == 0 and tiled[70, 90].sum() == 0
    assert tiled[20, 50].sum() == tiled[70, 5].sum() == 3 * 255


def test_words_fit_in_the_picture():
    rng = random.Random(0)
    for word in ("ox", "encyclopedias", "w" * 12):
        image = write_word(word, "#111111", "#ffffff", rng.randint(-24, 24))
        height, width = _ink(image)
        assert 8 < width <= SIZE - 6 and height < 60
