"""What is timed of a workload: one forward pass, or the prefill of a prompt and the decoding after it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_prune.errors import PlanError
from hf_prune.utils.forward import cache_argument, device_of, generates


@dataclass(frozen=True)
class Pass:
    """One kind of forward pass.

    Args:
        run: Runs the model once.
        times: How many of them the workload takes.
    """

    run: Callable[[], object]
    times: int = 1


def workload_passes(model: nn.Module, inputs: Mapping[str, Any], workload: Mapping[str, int]) -> dict[str, Pass]:
    """The passes that a workload consists of, by name.

    A generation is the ``"prefill"`` of the prompt, which gives the first new token, and a ``"decode"`` pass for every
    other one, on one token and a cache of keys and values. All of them are taken to cost what the one in the middle
    does.

    Args:
        model: The model, in eval mode.
        inputs: What :func:`~hf_prune.inference.speedup.workload_inputs` made for the workload.
        workload: ``batch_size`` and ``length``, or ``batch_size``, ``prompt`` and ``new_tokens``.

    Raises:
        PlanError: If the workload is a generation and the model is no causal language model with such a cache.
    """
    if "new_tokens" not in workload:
        return {"forward": Pass(lambda: model(**inputs))}
    parameters = inspect.signature(model.forward).parameters
    name = cache_argument(model)
    if not generates(model) or name not in parameters:
        raise PlanError(
            f"a workload with new_tokens is for causal language models with a cache, which {type(model).__name__} is "
            f"not: expected a workload such as {{'batch_size': 1, 'length': 128}}"
        )
    prompt = inputs["input_ids"]
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}  # as generate() does
    tokens = prompt.repeat(1, -(-workload["new_tokens"] // prompt.shape[1]) + 1)
    with torch.no_grad():
        middle = tokens[:, : prompt.shape[1] + workload["new_tokens"] // 2]
        cache = getattr(model(input_ids=middle, use_cache=True, **last_only), name)
    if not getattr(cache, "layers", None):
        raise PlanError(
            f"{type(model).__name__} keeps a {type(cache).__name__} and no cache of keys and values by layer, so the "
            f"decoding of single tokens cannot be timed: expected a workload with a length"
        )

    def decode() -> object:
        grown = copy.copy(cache)  # its layers replace their tensors as they grow, so that the cache stays as it is
        grown.layers = [copy.copy(layer) for layer in cache.layers]
        return model(input_ids=prompt[:, -1:], use_cache=True, **{name: grown}, **last_only)

    return {
        "prefill": Pass(lambda: model(input_ids=prompt, use_cache=True, **last_only)),
        "decode": Pass(decode, workload["new_tokens"] - 1),
    }


def timed(model: nn.Module, run: Callable[[], object]) -> Callable[[], object]:
    """A function that runs a model without gradients, and waits until it is done."""
    cuda = device_of(model).type == "cuda"

    def run_and_wait() -> None:
        with torch.inference_mode():
            run()
        if cuda:
            torch.cuda.synchronize()

    return run_and_wait
