"""A cache knows what it holds in memory, whatever happens to it."""

import pytest
import torch

from hf_prune.utils.offload_cache import OffloadCache


def test_what_is_in_memory_is_counted():
    cache = OffloadCache(100)
    cache.put("a", torch.zeros(10))
    assert cache.in_memory == 40
    cache.put("a", torch.zeros(15))  # in its place
    assert cache.in_memory == 60
    cache.put("b", (torch.zeros(10), [torch.zeros(2)]))  # 48 more do not fit
    assert cache.in_memory == 60
    assert torch.equal(cache.get("b")[0], torch.zeros(10))
    cache.put("c", torch.ones(10))
    assert cache.in_memory == 100
    cache.put("a", torch.ones(30))  # no longer fits
    assert cache.in_memory == 40
    assert torch.equal(cache.pop("a"), torch.ones(30))
    assert torch.equal(cache.pop("c"), torch.ones(10))
    assert cache.in_memory == 0
    with pytest.raises(KeyError):
        cache.get("c")
    cache.close()
    assert cache.in_memory == 0


def test_putting_takes_no_look_at_what_is_there():
    """Else ten thousand small values would take minutes."""
    cache = OffloadCache(10**9)
    looks = []

    class Watched(dict):
        def values(self):
            looks.append(1)
            return super().values()

    cache._values = Watched()
    for i in range(100):
        cache.put(i, torch.zeros(1))
    assert not looks
    cache.close()
