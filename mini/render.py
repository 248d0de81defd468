"""Pictures of 96 x 96 pixels: rasterised once and cached, composed by a few plain operations."""

from __future__ import annotations

import io
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from functools import cache
from importlib.metadata import version
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import xxhash
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from llava.errors import StorageError
from llava.files import make_folder

SIZE = 96
RASTERISER = f"{SIZE} px, resvg_py {version('resvg_py')}, Pillow {Image.__version__}"
_BATCH = 32  # drawings handed to a process, and committed to the cache, at a time
_TRIM_FROM, _MAX_ZOOM = 1.4, 6.0  # page sides in units of the drawing's
_WHITE = (255, 255, 255)


def rasterise(
    drawings: dict[str, bytes], cache: str | Path, trim: bool = False, processes: int = 2
) -> dict[str, bytes | None]:
    """PNG of every drawing (SVG, PNG or WebP bytes), fitted on a white square; None if it is blank.

    `trim` cuts the empty page around a small SVG drawing.

    Finished pictures are committed to `cache/pictures.sqlite` every 32, so an interrupted call
    resumes; the key covers the drawing, the size and the rasterisers' versions.
    """
    keys = {name: _key(raw, trim) for name, raw in drawings.items()}
    with _database(Path(cache) / "pictures.sqlite") as database:
        known = set(row[0] for row in database.execute("select key from picture"))
        todo = {key: drawings[name] for name, key in keys.items() if key not in known}
        for done in _in_processes(list(todo.items()), trim, processes):
            with database:
                database.executemany("insert or replace into picture values (?, ?)", done)
        select = "select png from picture where key = ?"
        return {name: database.execute(select, (key,)).fetchone()[0] for name, key in keys.items()}


def picture(raw: bytes, trim: bool = False) -> bytes | None:
    """One drawing as PNG; None when it cannot be drawn or comes out in a single colour."""
    if raw[:4] in (b"\x89PNG", b"RIFF"):
        image = Image.open(io.BytesIO(raw))
    else:
        try:
            image = _draw(raw.decode("utf-8", errors="replace"), trim)
        except ValueError:
            return None  # a handful of drawings are broken
    image = fit(image)
    return None if all(low == high for low, high in image.getextrema()) else png(image)


def _draw(svg: str, trim: bool) -> Image.Image:
    """Rasterise an SVG; trimmed, it is drawn again so that what is on the page fills the width."""
    import resvg_py  # 0.1 s, needed in the worker processes only

    def draw(width: int) -> Image.Image:
        # dpi: the default of 0 fails on units such as pt and mm; no system fonts: the same picture
        # on every machine
        data = resvg_py.svg_to_bytes(svg_string=svg, width=width, dpi=96, skip_system_fonts=True)
        return Image.open(io.BytesIO(bytes(data)))

    image = draw(SIZE)
    box = image.getchannel("A").getbbox()
    if not trim or box is None:
        return image
    zoom = max(image.size) / max(box[2] - box[0], box[3] - box[1])
    if zoom < _TRIM_FROM:
        return image
    image = draw(round(SIZE * min(zoom, _MAX_ZOOM)))
    return image.crop(image.getchannel("A").getbbox())


def fit(image: Image.Image, size: int = SIZE, background: tuple = _WHITE) -> Image.Image:
    """The image on a square background: as large as fits, centred, transparency filled."""
    image = image.convert("RGBA")
    scale = size / max(image.size)
    shape = tuple(max(1, round(side * scale)) for side in image.size)
    if shape != image.size:
        image = image.resize(shape, Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (size, size), background)
    canvas.paste(image, ((size - shape[0]) // 2, (size - shape[1]) // 2), image)
    return canvas


def frame(image: Image.Image, colour: str, width: int = 7) -> Image.Image:
    """The image made smaller inside a border of `colour`."""
    inner = SIZE - 2 * width
    framed = Image.new("RGB", (SIZE, SIZE), colour)
    framed.paste(image.resize((inner, inner), Image.Resampling.BICUBIC), (width, width))
    return framed


def tile(cells: list[Image.Image], columns: int, rows: int, places: list[int]) -> Image.Image:
    """Cells on a white grid; `places[i]` is the position of cell i, counted row by row."""
    side = SIZE // columns
    canvas = Image.new("RGB", (SIZE, SIZE), _WHITE)
    top = (SIZE - rows * side) // 2
    for cell, place in zip(cells, places, strict=True):
        cell = cell.resize((side, side), Image.Resampling.BICUBIC)
        canvas.paste(cell, (place % columns * side, top + place // columns * side))
    return canvas


def write_word(word: str, ink: str, paper: str, shift: int) -> Image.Image:
    """A word in Pillow's own typeface, as large as fits in 88 pixels, `shift` off the middle."""
    size = 30
    while (font := ImageFont.load_default(size)).getlength(word) > SIZE - 8:
        size -= 1
    canvas = Image.new("RGB", (SIZE, SIZE), paper)
    ImageDraw.Draw(canvas).text((SIZE // 2, SIZE // 2 + shift), word, ink, font, anchor="mm")
    return canvas


def png(image: Image.Image) -> bytes:
    """PNG bytes; equal pixels give equal bytes, so their hash is a hash of the pixels."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


@cache
def jpeg(picture: bytes) -> bytes:
    """A PNG as JPEG, in which most benchmarks keep their pictures."""
    buffer = io.BytesIO()
    open_png(picture).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def open_png(raw: bytes) -> Image.Image:
    """Inverse of `png`."""
    return Image.open(io.BytesIO(raw)).convert("RGB")


def _key(raw: bytes, trim: bool) -> str:
    return xxhash.xxh3_128_hexdigest(RASTERISER.encode() + b"\0\1"[trim : trim + 1] + raw)


def _in_processes(
    todo: list[tuple[str, bytes]], trim: bool, processes: int
) -> Iterator[list[tuple[str, bytes | None]]]:
    """Rasterise batches in worker processes that import nothing heavy."""
    if not todo:
        return
    bar = tqdm(total=len(todo), desc="rasterise", unit="image", disable=not sys.stderr.isatty())
    batches = [todo[start : start + _BATCH] for start in range(0, len(todo), _BATCH)]
    if processes < 2 or len(batches) == 1:
        results: Iterable = map(_batch, batches, repeat(trim))
        yield from _counted(results, bar)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from _counted(pool.map(_batch, batches, repeat(trim)), bar)


def _counted(results: Iterable, bar: tqdm) -> Iterator[list[tuple[str, bytes | None]]]:
    with bar:
        for result in results:
            bar.update(len(result))
            yield result


def _batch(jobs: list[tuple[str, bytes]], trim: bool) -> list[tuple[str, bytes | None]]:
    return [(key, picture(raw, trim)) for key, raw in jobs]


@contextmanager
def _database(path: Path) -> Iterator[sqlite3.Connection]:
    """The picture cache, created if need be; a damaged file is reported with the remedy."""
    make_folder(path.parent)
    try:
        with closing(sqlite3.connect(path, timeout=60)) as database:
            database.execute("create table if not exists picture (key text primary key, png blob)")
            yield database
    except sqlite3.DatabaseError as error:
        raise StorageError(
            f"{path}: {error}; free some disk space, or delete this file if it is damaged: "
            "it is only a cache"
        ) from error
