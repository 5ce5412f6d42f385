"""How much a model's predictions depend on what each target puts out, token by token; no labels are needed.

Let y be what a target puts out for one token, and g the gradient of the predictions with respect to it. A small change
d of y then changes the predictions by (g · d)² in the mean, the Gauss-Newton (or Fisher) approximation. Here g² is kept
as a product of two shares, one of the token and one of the output (the diagonal of the factors of Martens and Grosse
2015, arXiv:1503.05671), which is all that a layer-wise method can use without giving up its one Gram matrix for all
outputs.

"The predictions" are what comes out at the end: for a language model the distribution of the next token, with labels
sampled from the model itself (the Fisher information); for any other model its logits, or else its first output,
projected on random signs (the Gauss-Newton matrix of their squared change, by Hutchinson's estimator). The second does
not fade where a classifier is sure of itself, as it is on sentences that it was trained on.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_prune.activations import Batches, InputReader, eval_mode, on_device
from hf_prune.distributed import add_up, all_or_none, share
from hf_prune.errors import CalibrationError
from hf_prune.plan import PruningPlan
from hf_prune.targets import is_finite
