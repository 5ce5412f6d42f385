"""A slow twin of perplexity over windows: one token at a time, each with its own forward pass, in float64."""

from __future__ import annotations

import math

import torch


def reference_nlls(
    model: torch.nn.Module, tokens: list[int], window: int, stride: int | None = None, bos: int | None = None
) -> list[list[float]]:
    """Negative log-likelihoods of the tokens that each window predicts, for all windows that are full.

    Args:
        model: A causal language model in eval mode.
        tokens: The text.
        window: Tokens that the model sees at once, BOS included.
        stride: From one window to the next; by default they do not overlap.
        bos: Token that starts every window, or None.
    """
    lead = [] if bos is None else [bos]
    width = window - len(lead)
    stride = width if stride is None else stride
    found: list[list[float]] = []
    predicted: set[int] = set()
    start = 0
    while start + width <= len(tokens):
        nlls = []
        for position in range(start, start + width):
            context = lead + tokens[start:position]
            if not context or position in predicted:
                continue
            predicted.add(position)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([context])).logits[0, -1].double()
            nlls.append(float(logits.logsumexp(0) - logits[tokens[position]]))
        found.append(nlls)
        start += stride
    return found


def reference_perplexity(nlls: list[list[float]]) -> float:
    """exp of the mean over all predicted tokens."""
    every = [nll for window in nlls for nll in window]
    return math.exp(sum(every) / len(every))
