"""Nothing changes for users: masks and weights of many configurations are what they were.

A case that fails after a change that was meant to change results is written anew by ``python -m tests.golden.update``.
"""

from __future__ import annotations

import json

import pytest

from tests.golden.cases import CASES, FLOAT32, TOLERANCE, TOLERANCE_FLOAT32
from tests.golden.record import FILE, differences, plain

EXPECTED = json.loads(FILE.read_text())


def test_every_case_has_a_golden_value():
    assert list(EXPECTED) == list(CASES)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore")  # they are the matter of other tests
def test_same_as_before(name, tmp_path):
    found = plain(CASES[name](tmp_path))
    tolerance = TOLERANCE_FLOAT32 if name in FLOAT32 else TOLERANCE
    assert list(differences(EXPECTED[name], found, tolerance)) == []
