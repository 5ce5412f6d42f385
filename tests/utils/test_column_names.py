"""Columns are found by their usual names, whatever their case."""

import pytest
from datasets import Dataset

from hf_prune import ClassificationTask
from hf_prune.calibration.columns import text_columns
from hf_prune.utils.column_names import LABELS, usual_column, usual_texts


@pytest.mark.parametrize(
    ("available", "found"),
    [
        (["Label", "Text"], ("Text",)),
        (["TEXT", "text"], ("text",)),
        (["Premise", "Hypothesis", "text"], ("Premise", "Hypothesis")),
        (["Premise", "words"], ()),
    ],
)
def test_texts(available, found):
    assert usual_texts(available) == found


def test_labels():
    assert usual_column(["LABEL", "Class"], LABELS) == "LABEL"
    assert usual_column(["words"], LABELS) is None


def test_tables_as_spreadsheets_write_them(tmp_path):
    (tmp_path / "data.csv").write_text("Id,Text,Label\n1,good,1\n2,bad,0\n")
    task = ClassificationTask(str(tmp_path / "data.csv"))
    assert task.columns == {"text_columns": ("Text",), "label_column": "Label"}
    assert list(task.load("train")["Label"]) == [1, 0]
    assert text_columns(Dataset.from_dict({"Id": [1], "Text": ["a"], "Note": ["b"]}).to_dict()) == ("Text",)
