"""Measure what pruning costs and gains.

Takes a model and data, and returns accuracies, perplexities, comparisons of the dense and the pruned model on the same
examples, sweeps over sparsities, reports of what is zero or was removed, and plots. A new measure is a file with a
function and a result that states n and its error.
"""

from __future__ import annotations

from typing import Any

from hf_prune.import_hook import moved


def __getattr__(name: str) -> Any:  # pickles of earlier versions name classes here
    return moved(__name__, name)
