"""One process has nothing to share, and the batches of several are compared by a checksum."""

from __future__ import annotations

import pytest
import torch

from hf_prune.utils import distributed
from tests import models


def test_one_process_keeps_what_it_has():
    tensor, batches = torch.ones(2), iter([1, 2])
    assert distributed.rank_and_world_size() == (0, 1)
    assert distributed.all_reduce_sum(tensor) is distributed.broadcast(tensor) is tensor
    assert distributed.rank_items(batches) is batches
    with pytest.raises(KeyError), distributed.fail_together():
        raise KeyError
    assert distributed.is_main_process()


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
def test_the_checksum_of_batches_sees_every_value(change, same):
    first, second = (models.tiny_batches(models.tiny_bert()) for _ in range(2))
    change(second)
    assert (distributed._checksum(first) == distributed._checksum(second)) == same
