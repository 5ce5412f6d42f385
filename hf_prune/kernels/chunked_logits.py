"""Sums over tokens of something about their logits, which are never all in memory.

An output layer turns a few thousand numbers of each token into a logit for each word. Here chunks of tokens go through
it one after the other, and each chunk gives its part of the sum and of the gradient at once, so nothing is computed
twice and no more than two copies of a chunk of logits exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

CHUNK = 1 << 22  # logits

Term = Callable[[Tensor, slice], Tensor]
"""Takes logits (chunk, vocabulary), float32, and which tokens these are. Returns a sum over these tokens, and leaves
its gradient in place of the logits."""


def rows_of_chunk(vocabulary: int) -> int:
    """How many tokens go through the output layer at a time."""
    return max(1, CHUNK // vocabulary)


def sum_over_tokens(
    states: Tensor, project: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], vocabulary: int, term: Term
) -> Tensor:
    """A sum over tokens of a function of their logits, and its gradient.

    Args:
        states: (tokens, hidden), what the output layer reads.
        project: The output layer, and what comes after it: (chunk, hidden) to (chunk, vocabulary).
        parameters: Of the output layer.
        vocabulary: How many logits a token has.
        term: What is added up.

    Returns:
        A scalar, float32, that can be differentiated once with respect to the states and the parameters.
    """
    leaves = [t for t in (states, *parameters) if t.requires_grad and torch.is_grad_enabled()]
    needs_states = any(leaf is states for leaf in leaves)
    own = [leaf for leaf in leaves if leaf is not states]
    of_states = torch.zeros_like(states) if needs_states else None
    of_own = [torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in own]
    total = torch.zeros((), dtype=torch.float32 if states.device.type == "mps" else torch.float64, device=states.device)
    size = rows_of_chunk(vocabulary)
    for start in range(0, len(states), size):
        rows = slice(start, start + size)
        part = states[rows].detach().requires_grad_(needs_states)
        with torch.set_grad_enabled(bool(leaves)):
            logits = project(part)
        edge, dtype = get_gradient_edge(logits) if leaves else None, logits.dtype
        values = logits.detach().float()
        values = values.clone() if values.data_ptr() == logits.data_ptr() else values
        del logits  # unless the graph keeps it
        with torch.no_grad():
            total += term(values, rows).to(total)
        if edge is None:
            continue
        wanted = [part, *own] if needs_states else own
        found = list(torch.autograd.grad([edge], wanted, [values.to(dtype)], allow_unused=True))
        if of_states is not None and (gradient := found.pop(0)) is not None:
            of_states[rows] = gradient
        for total_of, gradient in zip(of_own, found, strict=True):
            if gradient is not None:
                total_of += gradient
    if not leaves:
        return total.float()
    gradients = [of_states] if of_states is not None else []
    gradients += [total_of.to(leaf.dtype) for total_of, leaf in zip(of_own, own, strict=True)]
    ordered = [states, *own] if needs_states else own
    result: Tensor = _Known.apply(total.float(), gradients, *ordered)
    return result


class _Known(torch.autograd.Function):
    """A value whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor], *_: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, None, *(known * gradient.to(known.dtype) for known in ctx.saved_tensors)


def cross_entropy(labels: Tensor, weights: Tensor) -> Term:
    """The weighted sum of the tokens' negative log-likelihoods of labels.

    Args:
        labels: (tokens,) class numbers; any valid one where the weight is 0.
        weights: (tokens,) float32.
    """

    def term(logits: Tensor, rows: slice) -> Tensor:
        chosen = labels[rows, None]
        log_likelihoods = _softmax_(logits, chosen)
        logits.scatter_add_(1, chosen, logits.new_full((), -1.0).expand_as(chosen)).mul_(weights[rows, None])
        return -(log_likelihoods * weights[rows]).sum(dtype=_sum_dtype(logits))

    return term


def sampled_likelihood(weights: Tensor, generator: torch.Generator) -> Term:
    """The weighted sum of the tokens' log-likelihoods of labels that are drawn from their own predictions.

    Args:
        weights: (tokens,) float32.
        generator: Draws the labels, on the CPU.
    """

    def term(logits: Tensor, rows: slice) -> Tensor:
        _, total = _exponentials_(logits)
        logits.div_(total)
        chosen = draw(logits, generator)
        log_likelihoods = logits.gather(1, chosen).log_()[:, 0]
        logits.neg_().scatter_add_(1, chosen, logits.new_ones(()).expand_as(chosen)).mul_(weights[rows, None])
        return (log_likelihoods * weights[rows]).sum(dtype=_sum_dtype(logits))

    return term


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A class number for each row (rows, 1), drawn by its probabilities.

    ``torch.multinomial`` would draw a random number for each class; one for each row is enough.

    Args:
        probabilities: (rows, classes) float32; each row sums to about 1.
        generator: Of random numbers, on the CPU, where the sums are taken as well: the same ones on every device.
    """
    sums = probabilities.cpu().cumsum(1)
    total = sums[:, -1:]
    points = torch.rand(total.shape, generator=generator) * total
    points = torch.minimum(points, total.nextafter(torch.zeros(())))  # below the total: never a class of probability 0
    return torch.searchsorted(sums, points, right=True).clamp_max_(sums.shape[1] - 1).to(probabilities.device)


def _softmax_(logits: Tensor, chosen: Tensor) -> Tensor:
    """Turn logits into probabilities, in place; returns the logarithms of the chosen ones (rows,)."""
    picked = logits.gather(1, chosen)
    largest, total = _exponentials_(logits)
    logits.div_(total)
    return (picked - largest - total.log())[:, 0]


def _exponentials_(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Exponentials of logits less the largest of their row, in place; returns these and the sums, (rows, 1) each."""
    largest = logits.amax(1, keepdim=True)
    logits.sub_(largest).exp_()
    return largest, logits.sum(1, keepdim=True)


def _sum_dtype(logits: Tensor) -> torch.dtype:
    return torch.float32 if logits.device.type == "mps" else torch.float64
