"""Tables for people and for spreadsheets."""

import csv
import io

import pytest

from hf_prune.utils.formatting import format_csv, format_duration, format_table, in_one_line, printable


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


@pytest.mark.parametrize(
    "hidden", [*"\x1b\x9b\r\x08\x7f\x85\xad\u200b\u200d\u2028\u2029\u202e\u2066\u2060\u3164\ufeff\ud800\U000e0041"]
)
def test_what_hides_or_controls_is_spelled_out(hidden):
    spelled = hidden.encode("unicode_escape").decode()
    assert printable(f"ä{hidden}\t日本\n") == f"ä{spelled}\t日本\n"
    assert in_one_line(f"ä{hidden}\t日本\n") == rf"ä{spelled}\t日本\n"
    assert spelled in format_table(["a"], [[hidden]])


def test_a_cell_is_one_line():
    assert format_table(["name", "n"], [["a\nerror: b\tc", "1"]]).splitlines()[2:] == [r"a\nerror: b\tc  1"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (119.7, "2 min 0 s"),
        (3600, "1 h 0 min"),
        (9e3, "2 h 30 min"),
    ],
)
def test_times_are_said_as_people_say_them(seconds, text):
    assert format_duration(seconds) == text
