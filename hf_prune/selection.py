"""Exact selection of the k lowest scores: the one loop that decides what is removed.

Every pool loses exactly ``k`` units, and equal scores are decided by position (the earlier one goes
first), so the result is that of a stable ascending sort. Sorting tens of millions of scores is what
makes pruning slow and hungry for memory, so nothing here sorts a pool: a random sample brackets the
k-th score, one pass counts what lies below the bracket and collects what lies inside, and only that
small rest is partitioned. The sample decides the speed, never the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 16  # scores looked at together: 256 KiB in float32, which stays in a core's cache
_SAMPLE = 1 << 14  # scores that bracket the k-th one
_SIGMAS = 4.0  # half-width of the bracket in standard errors of the sampled rank
_SMALL_POOL = 32  # pools up to this size (N:M groups) are ranked by comparing all pairs


def keep_highest(parts: Sequence[Callable[[], Tensor]], k: int) -> list[Tensor]:
    """Remove the ``k`` lowest scores of one pool that may span several tensors.

    Args:
        parts: One function per tensor that returns its scores, any shape, float32, without NaN.
            Each is called up to three times, so that a pool over a whole model never holds more
            than one tensor of scores; it must return the same scores every time.
        k: How many scores are removed from the whole pool, ``0 <= k <= total``.

    Returns:
        One bool tensor per part, shaped like its scores, True where the unit is kept.
    """
    if len(parts) == 1:
        scores = parts[0]()
        parts = [lambda: scores]
    sample = [_sample(part(), len(parts)) for part in parts]
    total = sum(size for _, size in sample)
    if k == 0 or k >= total:
        return [torch.full_like(part(), k == 0, dtype=torch.bool) for part in parts]
    threshold, ties_kept = _threshold(parts, k, *_bracket(sample, k, total))
    masks = [_above(part(), threshold) for part in parts]
    _keep_last_ties(masks, parts, threshold, ties_kept)
    return masks


def keep_highest_per_row(scores: Tensor, k: int) -> Tensor:
    """Remove the ``k`` lowest scores of every row: rows are the pools.

    Args:
        scores: (pools, units), float32, without NaN.
        k: How many units each pool loses, ``0 <= k <= units``.

    Returns:
        (pools, units) bool, True where the unit is kept.
    """
    pools, units = scores.shape
    if k == 0 or k >= units:
        return torch.full_like(scores, k == 0, dtype=torch.bool)
    keep = torch.empty_like(scores, dtype=torch.bool)
    per_chunk = max(1, _CHUNK // units)
    rank_rows = _rank_rows if units <= _SMALL_POOL else _split_rows
    for start in range(0, pools, per_chunk):
        rank_rows(scores[start : start + per_chunk], k, keep[start : start + per_chunk])
    return keep


def _rank_rows(scores: Tensor, k: int, keep: Tensor) -> None:
    """Rank short rows by comparing all pairs of columns, which vectorises over the rows."""
    columns = scores.t().contiguous()  # (units, pools)
    rank = torch.zeros_like(columns, dtype=torch.uint8)
    for j in range(1, len(columns)):
        for i in range(j):
            earlier_first = columns[i] <= columns[j]
            rank[j] += earlier_first
            rank[i] += ~earlier_first
    keep.copy_((rank >= k).t())


def _split_rows(scores: Tensor, k: int, keep: Tensor) -> None:
    threshold = torch.kthvalue(scores, k, dim=1, keepdim=True).values
    torch.gt(scores, threshold, out=keep)
    tied = scores == threshold
    surplus = (k - (scores < threshold).sum(1, keepdim=True)).clamp_(min=0)  # ties that go
    keep |= tied & (tied.cumsum(1) > surplus)


def _arrays(scores: Tensor) -> tuple[Any, Any]:
    """Flat scores for the fastest library on their device: NumPy on a CPU, torch elsewhere."""
    flat = scores.reshape(-1)
    return (np, flat.numpy()) if flat.device.type == "cpu" else (torch, flat)


def _sample(scores: Tensor, parts: int) -> tuple[np.ndarray, int]:
    """Random scores of one part and the part's size; the whole part where it is small."""
    flat = scores.reshape(-1)
    count = max(_SAMPLE // parts, 256)
    if flat.numel() > count:
        generator = torch.Generator().manual_seed(flat.numel())
        index = torch.randint(flat.numel(), (count,), generator=generator)
        return flat[index.to(flat.device)].cpu().numpy(), scores.numel()
    return flat.cpu().numpy(), scores.numel()


def _bracket(sample: list[tuple[np.ndarray, int]], k: int, total: int) -> tuple[float, float]:
    """Two scores between which the k-th lowest very probably lies."""
    values = np.concatenate([scores for scores, _ in sample])
    weights = np.concatenate([np.full(len(s), size / max(len(s), 1)) for s, size in sample])
    order = np.argsort(values)
    values, rank = values[order], np.cumsum(weights[order])
    share = k / total
    margin = _SIGMAS * total * (share * (1 - share) / len(values)) ** 0.5 + weights.max()
    low = np.searchsorted(rank, k - margin)
    high = np.searchsorted(rank, k + margin)
    return (
        float(values[low - 1]) if low > 0 else float("-inf"),
        float(values[high]) if high < len(values) else float("inf"),
    )


def _threshold(parts: Sequence[Callable[[], Tensor]], k: int, low: float, high: float) -> tuple[float, int]:
    """The k-th lowest score, and how many of those equal to it are kept.

    One pass counts what is at or below the ends of the bracket and collects what lies strictly
    between them; a large tie therefore costs no memory.
    """
    under_low = upto_low = upto_high = 0
    collected = []
    for part in parts:
        xp, flat = _arrays(part())
        for start in range(0, len(flat), _CHUNK):
            chunk = flat[start : start + _CHUNK]
            upto = chunk <= low
            under_low += int(xp.count_nonzero(chunk < low))
            upto_low += int(xp.count_nonzero(upto))
            upto_high += int(xp.count_nonzero(chunk <= high))
            collected.append(chunk[(chunk < high) & ~upto])
    between = xp.concatenate(collected)
    if not under_low < k <= upto_high:  # an unlucky sample: bracket everything
        return _threshold(parts, k, float("-inf"), float("inf"))
    if k <= upto_low:
        return low, upto_low - k
    if k > upto_low + len(between):
        return high, upto_high - k
    rank = k - upto_low
    if xp is np:
        threshold = float(np.partition(between, rank - 1)[rank - 1])
    else:
        threshold = float(torch.kthvalue(between, rank).values)
    return threshold, int(xp.count_nonzero(between <= threshold)) - rank


def _above(scores: Tensor, threshold: float) -> Tensor:
    xp, flat = _arrays(scores)
    keep = flat > threshold
    return (torch.from_numpy(keep) if xp is np else keep).view(scores.shape)


def _keep_last_ties(masks: list[Tensor], parts: Sequence[Callable[[], Tensor]], threshold: float, kept: int) -> None:
    """Give the last ``kept`` units whose score equals the threshold back to the masks."""
    for mask, part in zip(reversed(masks), reversed(parts), strict=True):
        if kept == 0:
            return
        tied = (part().reshape(-1) == threshold).nonzero().squeeze(1)[-kept:]
        mask.view(-1)[tied] = True
        kept -= len(tied)
