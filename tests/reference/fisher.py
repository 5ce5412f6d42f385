"""Slow twins of block-Fisher pruning: gradients of one example at a time, and the quadratic solved with multipliers."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5ForConditionalGeneration

from hf_prune.calibration.predictions import sampled_prediction
from hf_prune.kernels.matrix import Target
from tests.reference.pruning import reference_matrix


def reference_example_gradients(model: nn.Module, target: Target, batches: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """(out, in) gradient of what the model predicts for every example, by ``backward()`` on a batch of it alone."""
    found = []
    for number, batch in enumerate(batches):
        for i in range(len(batch["labels"])):
            example = {key: value[i : i + 1] for key, value in batch.items()}
            labels = example.pop("labels")
            if isinstance(model, T5ForConditionalGeneration):
                start = torch.full((1, 1), model.config.decoder_start_token_id)
                example["decoder_input_ids"] = torch.cat([start, labels[:, :-1]], dim=1)
            generator = torch.Generator().manual_seed(zlib.crc32(f"0:{number}:{i}".encode()))
            model.zero_grad()
            sampled_prediction(model(**example), None, generator).backward()
            gradient = model.get_parameter(target.name).grad
            found.append(reference_matrix(target, torch.zeros(target.shape) if gradient is None else gradient))
    model.zero_grad()
    return found


def reference_blocks(gradients: Sequence[Tensor], size: int) -> Tensor:
    """(out, blocks, size, size) of the mean of ggᵀ, element by element of the grid; zeros beyond the last input."""
    out, inputs = gradients[0].shape
    blocks = -(-inputs // size)
    found = torch.zeros(out, blocks, size, size, dtype=torch.float64)
    for gradient in gradients:
        for row in range(out):
            for block in range(blocks):
                part = gradient[row, block * size : (block + 1) * size].double()
                found[row, block, : len(part), : len(part)] += torch.outer(part, part) / len(gradients)
    return found


def reference_surgery(weight: Tensor, hessian: Tensor, gone: Sequence[int]) -> tuple[Tensor, float]:
    """The change of a vector that brings some entries to zero at the least cost, and ``δᵀHδ / 2``.

    Args:
        weight: (n,).
        hessian: (n, n).
        gone: Which entries.
    """
    n, k = len(weight), len(gone)
    pick = torch.zeros(k, n, dtype=torch.float64)
    for i, j in enumerate(gone):
        pick[i, j] = 1
    system = torch.zeros(n + k, n + k, dtype=torch.float64)
    system[:n, :n], system[:n, n:], system[n:, :n] = hessian, pick.t(), pick
    right = torch.cat([torch.zeros(n, dtype=torch.float64), -weight[list(gone)].double()])
    change = torch.linalg.solve(system, right)[:n]
    return change, float(0.5 * change @ hessian.double() @ change)
