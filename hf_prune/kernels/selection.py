"""Exact selection of the k lowest scores: the one loop that decides what is removed.

Every pool loses exactly ``k`` units, and equal scores are decided by position (the earlier one goes
first), so the result is that of a stable ascending sort. Sorting tens of millions of scores is what
makes pruning slow and hungry for memory, so nothing here sorts a pool: a random sample brackets the
k-th score, one pass counts what lies below the bracket and collects what lies inside, and only that
small rest is partitioned. The sample decides the speed, never the result.

Scores come in chunks that are made anew for each pass, small enough to stay in a core's cache, so that
not even one tensor of scores is held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 16  # scores looked at together: 256 KiB in float32, which stays in a core's cache
_SAMPLE = 1 << 14  # scores that bracket the k-th one, at least
_SAMPLE_SHARE = 1 / 128  # or this share of all, if that is more: what lies inside the bracket stays small
_LARGEST_SAMPLE = 1 << 21  # but no more than this: 8 MiB
_SIGMAS = 4.0  # half-width of the bracket in standard errors of the sampled rank
_SMALL_POOL = 32  # pools up to this size (N:M groups) are ranked by comparing all pairs
_FEW_SCORES = 1 << 12  # up to so many in all, sorting every pool is the fastest

Chunks = Callable[[], Iterable[Tensor]]


def keep_highest(parts: Sequence[Chunks], sizes: Sequence[int], k: int) -> list[Tensor]:
    """Remove the ``k`` lowest scores of one pool that may span several tensors.

    Args:
        parts: One function per tensor that returns its scores in order, in chunks of any shape, float32,
            without NaN. Each is called three to five times and must return the same scores every time.
        sizes: How many scores each part has.
        k: How many scores are removed from the whole pool, ``0 <= k <= sum(sizes)``.

    Returns:
        One (size,) bool tensor per part, True where the unit is kept, on the device of the scores.
    """
    total = sum(sizes)
    if k == 0 or k >= total:
        device = next(iter(parts[0]())).device
        return [torch.full((size,), k == 0, dtype=torch.bool, device=device) for size in sizes]
    threshold, ties = find_threshold(parts, sizes, k)
    return [keep_above(part, size, threshold, kept) for part, size, kept in zip(parts, sizes, ties, strict=True)]


def find_threshold(parts: Sequence[Chunks], sizes: Sequence[int], k: int) -> tuple[float, list[int]]:
    """Where :func:`keep_highest` cuts, for pools of which not even the masks fit into memory at once.

    Args:
        parts: As for :func:`keep_highest`.
        sizes: How many scores each part has.
        k: How many scores are removed from the whole pool.

    Returns:
        A score, and for each part how many of its units with just that score are kept: the last ones. Units with
        higher scores are kept as well; :func:`keep_above` makes the masks.
    """
    total = sum(sizes)
    if k == 0:
        return float("-inf"), list(sizes)
    if k >= total:
        return float("inf"), [0] * len(sizes)
    threshold, left = _threshold(parts, k, *_bracket(_sample(parts, total), k, total))
    ties = [0] * len(parts)
    for i in reversed(range(len(parts))):
        if left == 0:
            break
        tied = left if i == 0 else sum(int((chunk == threshold).sum()) for chunk in parts[i]())
        ties[i] = min(tied, left)
        left -= ties[i]
    return threshold, ties


def keep_above(part: Chunks, size: int, threshold: float, ties: int) -> Tensor:
    """The mask of one part of a pool that was cut at a threshold.

    Args:
        part: Its scores, as for :func:`keep_highest`; called once, or twice where ties are kept.
        size: How many scores it has.
        threshold: Units with higher scores are kept.
        ties: How many of the units with just that score are kept: the last ones.

    Returns:
        (size,) bool, True where the unit is kept.
    """
    mask, tied = _above(part(), size, threshold, bool(ties))
    gone, start = tied - ties, 0  # of the units at the threshold the first ones go
    for chunk in part() if ties else ():
        for flat in chunk.reshape(-1).split(CHUNK):
            equal = flat == threshold
            mask[start : start + len(flat)] |= equal & (equal.cumsum(0) > gone)
            gone = max(0, gone - int(equal.sum()))
            start += len(flat)
    return mask


def keep_highest_per_row(scores: Tensor, k: int) -> Tensor:
    """Remove the ``k`` lowest scores of every row: rows are the pools.

    Args:
        scores: (pools, units), float32, without NaN.
        k: How many units each pool loses, ``0 <= k <= units``.

    Returns:
        (pools, units) bool, True where the unit is kept.
    """
    units = scores.shape[1]
    if k == 0 or k >= units:
        return torch.full_like(scores, k == 0, dtype=torch.bool)
    if scores.numel() <= _FEW_SCORES:
        gone = scores.argsort(dim=1, stable=True)[:, :k]
        return torch.ones_like(scores, dtype=torch.bool).scatter_(1, gone, False)
    per_chunk = max(1, CHUNK // units)
    rank_rows = _rank_rows if units <= _SMALL_POOL else _split_rows
    return torch.cat([rank_rows(rows, k) for rows in scores.split(per_chunk)])


def _rank_rows(scores: Tensor, k: int) -> Tensor:
    """Rank short rows by comparing all pairs of columns, which vectorises over the rows."""
    columns = scores.t().contiguous()  # (units, pools)
    rank = torch.zeros_like(columns, dtype=torch.uint8)
    for j in range(1, len(columns)):
        for i in range(j):
            earlier_first = columns[i] <= columns[j]
            rank[j] += earlier_first
            rank[i] += ~earlier_first
    return (rank >= k).t()


def _split_rows(scores: Tensor, k: int) -> Tensor:
    threshold = torch.kthvalue(scores, k, dim=1, keepdim=True).values
    tied = scores == threshold
    surplus = k - (scores < threshold).sum(1, keepdim=True)  # ties that go
    return (scores > threshold) | (tied & (tied.cumsum(1) > surplus))


def _arrays(chunks: Iterable[Tensor]) -> Iterator[tuple[Any, Any]]:
    """Flat chunks for the fastest library on their device: NumPy on a CPU, torch elsewhere."""
    for chunk in chunks:
        for flat in chunk.reshape(-1).split(CHUNK):
            yield (np, flat.numpy()) if flat.device.type == "cpu" else (torch, flat)


def _sample(parts: Sequence[Chunks], total: int) -> np.ndarray:
    """The same share of every chunk's scores at random places, sorted; all of them where they are few."""
    share = min(max(_SAMPLE / total, _SAMPLE_SHARE), _LARGEST_SAMPLE / total)
    generator = np.random.default_rng(total)
    found = []
    for part in parts:
        for _, flat in _arrays(part()):
            if share < 1:
                flat = flat[generator.integers(len(flat), size=math.ceil(share * len(flat)))]
            found.append(flat if isinstance(flat, np.ndarray) else flat.cpu().numpy())
    return np.sort(np.concatenate(found))


def _bracket(sample: np.ndarray, k: int, total: int) -> tuple[float, float]:
    """Two scores between which the k-th lowest very probably lies."""
    share = k / total
    margin = _SIGMAS * math.sqrt(share * (1 - share) * len(sample)) + 1
    low, high = math.floor(share * len(sample) - margin), math.ceil(share * len(sample) + margin)
    return (
        float(sample[low]) if low >= 0 else float("-inf"),
        float(sample[high]) if high < len(sample) else float("inf"),
    )


def _threshold(parts: Sequence[Chunks], k: int, low: float, high: float) -> tuple[float, int]:
    """The k-th lowest score, and how many of those equal to it are kept.

    One pass counts what is at or below the ends of the bracket and collects what lies strictly
    between them; a large tie therefore costs no memory.
    """
    under_low = upto_low = upto_high = 0
    collected = []
    for part in parts:
        for xp, chunk in _arrays(part()):
            upto = chunk <= low
            under_low += int(xp.count_nonzero(chunk < low))
            upto_low += int(xp.count_nonzero(upto))
            upto_high += int(xp.count_nonzero(chunk <= high))
            inside = chunk[(chunk < high) & ~upto]
            collected.append(inside if xp is np else inside.cpu().numpy())  # parts may lie on several devices
    between = np.concatenate(collected)
    if not under_low < k <= upto_high:  # an unlucky sample: bracket everything
        return _threshold(parts, k, float("-inf"), float("inf"))
    if k <= upto_low:
        return low, upto_low - k
    if k > upto_low + len(between):
        return high, upto_high - k
    rank = k - upto_low
    threshold = float(np.partition(between, rank - 1)[rank - 1])
    return threshold, int(np.count_nonzero(between <= threshold)) - rank


def _above(chunks: Iterable[Tensor], size: int, threshold: float, count: bool) -> tuple[Tensor, int]:
    """Which scores are above a threshold and, if asked for, how many are just there."""
    mask, start, tied = None, 0, 0
    for xp, chunk in _arrays(chunks):
        if mask is None:
            mask = torch.empty(size, dtype=torch.bool, device=None if xp is np else chunk.device)
        part = mask[start : start + len(chunk)]
        xp.greater(chunk, threshold, out=part.numpy() if xp is np else part)
        start += len(chunk)
        if count:
            tied += int(xp.count_nonzero(chunk == threshold))
    assert mask is not None
    assert start == size
    return mask, tied
