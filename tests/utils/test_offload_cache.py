"""A shelf knows what it holds in memory, whatever happens to it."""

import pytest
import torch

from hf_prune.utils.offload_cache import OffloadCache


def test_what_is_in_memory_is_counted():
    shelf = OffloadCache(100)
    shelf.put("a", torch.zeros(10))
    assert shelf.in_memory == 40
    shelf.put("a", torch.zeros(15))  # in its place
    assert shelf.in_memory == 60
    shelf.put("b", (torch.zeros(10), [torch.zeros(2)]))  # 48 more do not fit
    assert shelf.in_memory == 60
    assert torch.equal(shelf.get("b")[0], torch.zeros(10))
    shelf.put("c", torch.ones(10))
    assert shelf.in_memory == 100
    shelf.put("a", torch.ones(30))  # no longer fits
    assert shelf.in_memory == 40
    assert torch.equal(shelf.pop("a"), torch.ones(30))
    assert torch.equal(shelf.pop("c"), torch.ones(10))
    assert shelf.in_memory == 0
    with pytest.raises(KeyError):
        shelf.get("c")
    shelf.close()
    assert shelf.in_memory == 0


def test_putting_takes_no_look_at_what_is_there():
    """Else ten thousand small values would take minutes."""
    shelf = OffloadCache(10**9)
    looks = []

    class Watched(dict):
        def values(self):
            looks.append(1)
            return super().values()

    shelf._values = Watched()
    for i in range(100):
        shelf.put(i, torch.zeros(1))
    assert not looks
    shelf.close()
