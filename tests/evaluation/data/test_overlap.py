"""Texts that were cut from one another are found."""

import pytest
from datasets import Dataset

from hf_prune.evaluation.data.classification import sample_order
from hf_prune.evaluation.data.overlap import overlapping
from hf_prune.evaluation.tasks import ClassificationTask, classification


@pytest.mark.parametrize(
    ("text", "other", "expected"),
    [
        ("a b c d e", "x a b c d e y", True),
        ("x A B c d e", "a b c d E z", True),
        ("a b c d", "x a b c d y", False),  # four words only
        ("a b c d", "a b c d ", True),
        ("a b c d e", "a b c x d e", False),
        ("", "a", False),
    ],
)
def test_five_words_in_a_row(text, other, expected):
    assert overlapping([text], ["unrelated words", other]) == [expected]
    assert overlapping([other], [text]) == [expected]


def test_held_out_examples_are_no_parts_of_those_that_calibration_sees(monkeypatch):
    long = [f"the number {i} of many {i} long sentences in {i} a row" for i in range(40)]
    texts = [text for i, text in enumerate(long) for text in (text, f"of many {i} long sentences", f"short {i}")]
    data = Dataset.from_dict({"sentence": texts, "label": [0] * len(texts)})
    monkeypatch.setattr(classification, "load_classification", lambda *_, **__: data)
    task = ClassificationTask("glue/sst2", ("sentence",), "label", calibration_samples=30)
    seen = {texts[i] for i in sample_order(len(texts))[:30]}
    found = list(task.held_out(1000)["sentence"])
    numbers = [i for i, text in enumerate(long) if seen & {text, f"of many {i} long sentences"}]
    assert numbers
    assert not any(f" {i} long" in text for text in found for i in numbers)
    expected = [t for i, t in enumerate(texts) if t not in seen and not (i // 3 in numbers and i % 3 < 2)]
    assert sorted(found) == sorted(expected)
    assert len(task.held_out(7)) == 7
