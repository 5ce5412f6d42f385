"""One process has nothing to share."""

from __future__ import annotations

import pytest
import torch

from hf_prune.utils import distributed


def test_one_process_keeps_what_it_has():
    tensor, batches = torch.ones(2), iter([1, 2])
    assert distributed.rank_and_world_size() == (0, 1)
    assert distributed.all_reduce_sum(tensor) is distributed.broadcast(tensor) is tensor
    assert distributed.rank_items(batches) is batches
    with pytest.raises(KeyError), distributed.fail_together():
        raise KeyError
    assert distributed.is_main_process()
