"""Exact selection of the k lowest scores: the one place that decides what is removed.

Every pool loses exactly ``k`` units, and equal scores are decided by position (the earlier one is removed), so the
result is that of a stable ascending sort. Sorting tens of millions of scores would take most of the time and memory of
pruning, so nothing here sorts a large pool: a random sample brackets the k-th score, one pass counts the scores below
the bracket and collects those inside, and only these few are partitioned. The sample affects the speed, never the
result.

Scores come in chunks that are computed again for each pass, small enough to stay in a core's cache, so that not even
one tensor of scores is held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 16  # scores in one step: 256 KiB in float32, which stays in a core's cache
_SAMPLE = 1 << 14  # smallest sample that brackets the k-th score
_SAMPLE_SHARE = 1 / 128  # or this share of all scores, if that is more: few scores then lie inside the bracket
_LARGEST_SAMPLE = 1 << 21  # largest sample: 8 MiB
_SIGMAS = 4.0  # half-width of the bracket in standard errors of the sampled rank
_SMALL_POOL = 32  # pools up to this size (N:M groups) are ranked by comparing all pairs
_FEW_SCORES = 1 << 12  # up to so many scores in all, sorting every pool is the fastest

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
    """The score at which :func:`keep_highest` cuts, for pools whose masks do not fit into memory at once.

    Args:
        parts: As for :func:`keep_highest`.
        sizes: How many scores each part has.
        k: How many scores are removed from the whole pool.

    Returns:
        The score, and for each part how many of its units with exactly this score are kept: the last ones. Units with
        higher scores are kept as well; :func:`keep_above` makes the masks.
    """
    total = sum(sizes)
    if k == 0:
        return float("-inf"), list(sizes)
    if k >= total:
        return float("inf"), [0] * len(sizes)
    threshold, kept_ties = _threshold(parts, k, *_bracket(_sample(parts, total), k, total))
    # Among equal scores the earlier ones are removed: so the last parts keep their ties first.
    ties = [0] * len(parts)
    for i in reversed(range(len(parts))):
        if kept_ties == 0:
            break
        tied = kept_ties if i == 0 else sum(int((chunk == threshold).sum()) for chunk in parts[i]())
        ties[i] = min(tied, kept_ties)
        kept_ties -= ties[i]
    return threshold, ties


def keep_above(part: Chunks, size: int, threshold: float, ties: int) -> Tensor:
    """The mask of one part of a pool that was cut at a threshold.

    Args:
        part: Its scores, as for :func:`keep_highest`; called once, or twice where ties are kept.
        size: How many scores it has.
        threshold: Units with higher scores are kept.
        ties: How many of the units with exactly this score are kept: the last ones.

    Returns:
        (size,) bool, True where the unit is kept.
    """
    mask, tied = _above(part(), size, threshold, bool(ties))
    to_remove, start = tied - ties, 0  # of the units at the threshold, the first ones
    for chunk in part() if ties else ():
        for flat in chunk.reshape(-1).split(CHUNK):
            equal = flat == threshold
            mask[start : start + len(flat)] |= equal & (equal.cumsum(0) > to_remove)
            to_remove = max(0, to_remove - int(equal.sum()))
            start += len(flat)
    return mask


def keep_highest_per_row(scores: Tensor, k: int) -> Tensor:
    """Remove the ``k`` lowest scores of every row: rows are the pools.

    Args:
        scores: (pools, units), float32, without NaN.
        k: How many units are removed from each pool, ``0 <= k <= units``.

    Returns:
        (pools, units) bool, True where the unit is kept.
    """
    units = scores.shape[1]
    if k == 0 or k >= units:
        return torch.full_like(scores, k == 0, dtype=torch.bool)
    if scores.numel() <= _FEW_SCORES:
        lowest = scores.argsort(dim=1, stable=True)[:, :k]
        return torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, False)
    per_chunk = max(1, CHUNK // units)
    rank_rows = _rank_rows if units <= _SMALL_POOL else _split_rows
    return torch.cat([rank_rows(rows, k) for rows in scores.split(per_chunk)])


def _rank_rows(scores: Tensor, k: int) -> Tensor:
    """Rank short rows by comparing all pairs of columns, which vectorises over the rows.

    A sort of each row would run millions of tiny sorts; here a pair is one operation over all rows.
    """
    columns = scores.t().contiguous()  # (units, pools)
    rank = torch.zeros_like(columns, dtype=torch.uint8)
    for j in range(1, len(columns)):
        for i in range(j):
            earlier_first = columns[i] <= columns[j]  # of equal scores the earlier one has the lower rank
            rank[j] += earlier_first
            rank[i] += ~earlier_first
    return (rank >= k).t()


def _split_rows(scores: Tensor, k: int) -> Tensor:
    """Cut longer rows at their k-th lowest score, and among scores equal to it remove the first ones."""
    threshold = torch.kthvalue(scores, k, dim=1, keepdim=True).values
    tied = scores == threshold
    surplus = k - (scores < threshold).sum(1, keepdim=True)  # ties that are removed
    return (scores > threshold) | (tied & (tied.cumsum(1) > surplus))


def _arrays(chunks: Iterable[Tensor]) -> Iterator[tuple[Any, Any]]:
    """Flat chunks for the fastest library on their device: NumPy on a CPU, torch elsewhere."""
    for chunk in chunks:
        for flat in chunk.reshape(-1).split(CHUNK):
            yield (np, flat.numpy()) if flat.device.type == "cpu" else (torch, flat)


def _sample(parts: Sequence[Chunks], total: int) -> np.ndarray:
    """Sample the same share of the scores of every chunk, sorted; all scores where they are few."""
    share = min(max(_SAMPLE / total, _SAMPLE_SHARE), _LARGEST_SAMPLE / total)
    generator = np.random.default_rng(total)
    samples = []
    for part in parts:
        for _, flat in _arrays(part()):
            if share < 1:
                flat = flat[generator.integers(len(flat), size=math.ceil(share * len(flat)))]
            samples.append(flat if isinstance(flat, np.ndarray) else flat.cpu().numpy())
    return np.sort(np.concatenate(samples))


def _bracket(sample: np.ndarray, k: int, total: int) -> tuple[float, float]:
    """Two scores between which the k-th lowest very probably lies.

    The number of sampled scores below the k-th one is binomial: its standard deviation gives the width.
    """
    share = k / total
    margin = _SIGMAS * math.sqrt(share * (1 - share) * len(sample)) + 1
    low, high = math.floor(share * len(sample) - margin), math.ceil(share * len(sample) + margin)
    return (
        float(sample[low]) if low >= 0 else float("-inf"),
        float(sample[high]) if high < len(sample) else float("inf"),
    )


def _threshold(parts: Sequence[Chunks], k: int, low: float, high: float) -> tuple[float, int]:
    """The k-th lowest score, and how many of those equal to it are kept.

    One pass counts the scores at or below each end of the bracket, and collects those strictly between the ends. Scores
    equal to an end are only counted, so that a large tie takes no memory.
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
    if not under_low < k <= upto_high:  # the bracket misses the k-th score: with everything inside it cannot
        return _threshold(parts, k, float("-inf"), float("inf"))
    if k <= upto_low:
        return low, upto_low - k
    if k > upto_low + len(between):
        return high, upto_high - k
    rank = k - upto_low
    threshold = float(np.partition(between, rank - 1)[rank - 1])
    return threshold, int(np.count_nonzero(between <= threshold)) - rank


def _above(chunks: Iterable[Tensor], size: int, threshold: float, count: bool) -> tuple[Tensor, int]:
    """Which scores are above a threshold and, if ``count``, how many are equal to it."""
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
