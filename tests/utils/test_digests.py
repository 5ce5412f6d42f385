"""Digests tell batches apart, and are the same in every process."""

from __future__ import annotations

import pytest
import torch

from hf_prune.utils.digests import batches_digest, examples_digest, tensors_digest
from tests import models


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda b: b[0]["input_ids"].add_(0), True),
        (lambda b: b[0]["input_ids"].add_(1), False),
        (lambda b: b[0].update(labels=b[0]["labels"].float()), False),
        (lambda b: b.reverse(), False),
        (lambda b: b[1].update(extra=None), False),
        (lambda b: b.append("text"), False),
    ],
)
def test_the_digest_of_batches_sees_every_value(change, same):
    first, second = (models.tiny_batches(models.tiny_bert()) for _ in range(2))
    change(second)
    assert (batches_digest(first) == batches_digest(second)) == same


def test_objects_count_by_their_kind_and_not_by_their_address():
    class Options:
        pass

    assert batches_digest([{"options": Options()}]) == batches_digest([{"options": Options()}])
    assert batches_digest([{"options": Options()}]) != batches_digest([{"options": object()}])


def test_a_digest_of_tensors_sees_names_dtypes_shapes_and_bytes():
    ones = torch.ones(2, 2)
    others = [("b", ones), ("a", ones.double()), ("a", ones.view(4)), ("a", ones.clone().fill_(2))]
    digests = {tensors_digest([pair]) for pair in [("a", ones), *others]}
    assert len(digests) == 5
    assert {len(digest) for digest in digests} == {16}
    assert tensors_digest([("a", ones.t())]) == tensors_digest([("a", ones)])
    assert examples_digest(None) is None
    assert examples_digest([{"x": [1.0]}]) == tensors_digest([("0.x", torch.tensor([1.0]))])
