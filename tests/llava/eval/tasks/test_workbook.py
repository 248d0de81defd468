"""Workbooks: what is written is read back as text, and nothing in it is a formula."""

from __future__ import annotations

import io

from openpyxl import load_workbook

from llava.eval.tasks.workbook import workbook


def test_cells_come_back():
    rows = [["index", "prediction"], [1, "=1+1"], [2, None], [3, "a\x00b\nc"], [4, "350°F"]]
    sheet = load_workbook(io.BytesIO(workbook(rows))).active
    assert [[cell.value for cell in row] for row in sheet.rows] == [
        ["index", "prediction"],
        [1, "=1+1"],
        [2, None],
        [3, "ab\nc"],
        [4, "350°F"],
    ]
    assert sheet["B2"].data_type == "s" and sheet["A2"].data_type == "n"
