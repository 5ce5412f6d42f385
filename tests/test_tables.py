"""Tables for people and for spreadsheets."""

import csv
import io

import pytest

from hf_prune.tables import format_csv


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "  =1", "\uff1d1"])
def test_texts_are_no_formulas(text):
    safe = "'" + text.replace("\r", " ")
    ((_, header), (number, cell)) = csv.reader(
        io.StringIO(format_csv(["n", text], [{"n": -1.5, text: text}]), newline="")
    )
    assert (header, number, cell) == (safe, "-1.5", safe)


def test_other_cells_are_as_they_are():
    rows = [{"a": "magnitude, 2:4", "b": -2, "c": 1e-9}, {"a": 'say "x"', "b": 0, "c": True}]
    assert format_csv(["a", "b", "c"], rows) == 'a,b,c\n"magnitude, 2:4",-2,1e-09\n"say ""x""",0,True\n'
