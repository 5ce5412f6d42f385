"""Statistics, N:M patterns and histograms of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hf_prune.kernels.matrix import Target
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.traits import nm_pattern
from hf_prune.utils.offloaded_weights import values_of

_CHUNK = 1 << 18  # weights processed at a time
NM_PATTERNS = ((2, 4),)  # patterns that sparse tensor cores support
_USED = 0.5  # of the weights that a pattern allows, the share that is not zero; below, it is fulfilled by accident


@dataclass(frozen=True)
class WeightStatistics:
    """Minimum, maximum, mean and population standard deviation of a tensor, zeros included."""

    min: float
    max: float
    mean: float
    std: float

    @classmethod
    def of(cls, tensor: Tensor) -> WeightStatistics:
        """Statistics of a tensor, accumulated in float64."""
        seen, mean, spread = 0, 0.0, 0.0
        for part in tensor.reshape(-1).split(_CHUNK):  # a copy in float64 would be up to four times the tensor
            variance, center = (float(x) for x in torch.var_mean(part.double(), correction=0))
            share = len(part) / (seen + len(part))
            spread += len(part) * (variance + (center - mean) ** 2 * (1 - share))
            mean += (center - mean) * share
            seen += len(part)
        return cls(float(tensor.min()), float(tensor.max()), mean, math.sqrt(spread / seen))


def nm_patterns(target: Target, weight: Tensor, config: PruningConfig | None = None) -> tuple[str, ...]:
    """The N:M patterns that a weight satisfies: the one it was pruned to, and those that hardware supports.

    Very sparse weights satisfy many patterns by accident, so a hardware pattern counts only if at least half of the
    weights that it allows are not zero.

    Args:
        target: The target that the weight belongs to.
        weight: Its values, in its own layout.
        config: The settings that it was pruned by.
    """
    pattern = None if config is None else nm_pattern(config)
    matrix = target.matrix(weight)
    nonzero = int(weight.count_nonzero())
    used = [(n, m) for n, m in NM_PATTERNS if nonzero >= _USED * n / m * weight.numel()]
    candidates = dict.fromkeys([*([pattern] if pattern else []), *used])
    satisfied = [(n, m) for n, m in candidates if target.inputs % m == 0]
    for rows in matrix.split(max(1, _CHUNK // matrix.shape[1])):
        kept = rows != 0
        satisfied = [(n, m) for n, m in satisfied if int(kept.reshape(-1, m).sum(1, dtype=torch.int32).max()) <= n]
    return tuple(f"{n}:{m}" for n, m in satisfied)


@dataclass(frozen=True)
class WeightHistogram:
    """The distribution of weights.

    Args:
        edges: (bins + 1,) bin edges, symmetric about zero.
        counts: (bins,) non-zero weights in each bin; values beyond the edges are in the outer bins.
        zeros: How many weights are exactly zero.
    """

    edges: np.ndarray
    counts: np.ndarray
    zeros: int


def weight_histogram(model: nn.Module, names: list[str], bins: int = 81, limit: float | None = None) -> WeightHistogram:
    """Histogram of some parameters of a model.

    Args:
        model: The model.
        names: Parameter names.
        bins: How many bins; an odd number puts one astride zero.
        limit: The outermost edges; by default four times the largest standard deviation of the parameters.
    """
    parameters: Mapping[str, Tensor] = dict(model.named_parameters())
    weights = [values_of(model, name, parameters[name]).float().reshape(-1).cpu() for name in names]
    if limit is None:
        limit = 4 * max((float(w.std(correction=0)) for w in weights), default=0.0) or 1.0
    limit = float(np.float32(limit))  # so that clamped weights lie within the last edge
    edges = np.linspace(-limit, limit, bins + 1)
    counts, zeros = np.zeros(bins, dtype=np.int64), 0
    for weight in weights:
        values = weight[weight != 0].clamp(-limit, limit).numpy()
        counts += np.histogram(values, edges)[0]
        zeros += weight.numel() - len(values)
    return WeightHistogram(edges, counts, zeros)
