"""Parquet files as Hugging Face's datasets library writes them, images as {bytes, path}."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def picture(content: bytes | None) -> dict | None:
    """A cell of the image type."""
    return None if content is None else {"bytes": content, "path": "1.png"}


def write(path: Path, rows: list[dict], images: tuple[str, ...] = (), groups: int = 100) -> Path:
    """`rows` as a file, `images` naming the columns of the image type."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    for name in images:
        column = pa.array([row[name] for row in rows], IMAGE)
        table = table.set_column(table.schema.get_field_index(name), name, column)
    pq.write_table(table, path, row_group_size=groups)
    return path
