"""The output layer of a language model, where a loss can be computed from what it reads, a chunk of tokens at a time.

The logits of one window of 2,048 tokens over a vocabulary of 128,000 are 1 GB in float32, and a loss and its gradient
take several times that. Where a model's logits are its output layer applied to its last hidden states, scaled or
capped at most, that layer is left out of the run and applied to chunks; :mod:`hf_prune.kernels.chunked_logits` does
the rest. Whether they are is tried on the model at hand: other models run as they always did.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.calibration.batches import IGNORED
from hf_prune.calibration.block_sequence import replaced_forward
from hf_prune.calibration.predictions import check_finite, named_logits, sampled_prediction
from hf_prune.kernels import chunked_logits
from hf_prune.kernels.chunked_logits import Term, cross_entropy, sampled_likelihood, sum_over_tokens
from hf_prune.utils.forward import is_encoder_decoder, run_model

_TOKENS = 16  # of a sample on which a model is tried
_LARGE = 50.0  # logits beyond any cap
_INPUTS = {"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids"}
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}

Run = Callable[[Mapping[str, Any]], Any]
"""Runs a model on a batch."""


@dataclass(frozen=True)
class OutputHead:
    """The output layer of a model whose logits are nothing but that layer's outputs, scaled or capped.

    Args:
        layer: The layer.
        scale: What its outputs are multiplied with.
        cap: What they are squeezed between, with either sign, by a hyperbolic tangent; 0 for no cap.
    """

    layer: nn.Linear
    scale: float = 1.0
    cap: float = 0.0

    @property
    def vocabulary(self) -> int:
        """How many logits a token has."""
        return len(self.layer.weight)

    def logits(self, states: Tensor) -> Tensor:
        """(tokens, hidden) to (tokens, vocabulary)."""
        return self.rescaled(self.layer(states))

    def rescaled(self, outputs: Tensor) -> Tensor:
        """What the model makes of the layer's outputs."""
        if self.cap:
            return (outputs / self.cap).tanh() * self.cap
        return outputs if self.scale == 1 else outputs * self.scale

    def states(self, run: Run, batch: Mapping[str, Any]) -> Tensor:
        """Run a model on a batch without its labels: the hidden states before the layer, (batch, seq, hidden)."""
        states: Tensor | None = _run_without(self.layer, run, _without_labels(batch))[0]
        assert states is not None
        return states

    def sum(self, states: Tensor, term: Term) -> Tensor:
        """Add up something about the logits of states (tokens, hidden)."""

        def checked(logits: Tensor, rows: slice) -> Tensor:
            check_finite(logits)
            return term(logits, rows)

        own = [parameter for parameter in self.layer.parameters() if not parameter.is_meta]
        return sum_over_tokens(states, self.logits, own, self.vocabulary, checked)

    def sampled(self, run: Run, batch: Mapping[str, Any], mask: Tensor | None, generator: torch.Generator) -> Tensor:
        """What :func:`~hf_prune.calibration.predictions.sampled_prediction` returns for a batch.

        Args:
            run: Runs the model.
            batch: Its inputs.
            mask: (batch, seq), 0 for the tokens whose predictions do not count; None if all do.
            generator: Draws the labels, on the CPU.
        """
        states = self.states(run, batch)
        counted = torch.ones(states.shape[:2], device=states.device)
        if mask is not None and mask.shape == counted.shape:
            counted = counted * mask.to(states.device)
        return self.sum(states.flatten(0, 1), sampled_likelihood(counted.flatten(), generator))

    def cross_entropy(self, run: Run, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
        """The sum of the losses of a causal language model over the tokens with labels, and how many these are."""
        states = self.states(run, batch)
        labels = batch["labels"].to(states.device)
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        counted = following != IGNORED
        term = cross_entropy(following.masked_fill(~counted, 0), counted.float())
        return self.sum(states.flatten(0, 1), term), int(counted.sum())


def sampled_by(
    head: OutputHead | None, run: Run, batch: Mapping[str, Any], mask: Tensor | None, generator: torch.Generator
) -> Tensor:
    """What :meth:`OutputHead.sampled` returns; without a head, from all logits of the model's output."""
    if head is not None:
        return head.sampled(run, batch, mask, generator)
    return sampled_prediction(run(batch), mask, generator)


class HeadFinder:
    """Finds the output layer of a model, and remembers for which kinds of batches it may be left out.

    Args:
        model: The model, in eval mode whenever it is run.
        run: Runs it on a batch; None to pass nothing else.
        seen: Modules whose outputs somebody watches.
    """

    def __init__(self, model: nn.Module, run: Run | None = None, seen: Iterable[nn.Module] = ()) -> None:
        self._model = model
        self._run = run or (lambda inputs: run_model(model, inputs))
        layer = getattr(model, "get_output_embeddings", lambda: None)()
        usable = (
            isinstance(layer, nn.Linear)
            and not is_encoder_decoder(model)
            and all(module is not layer for module in seen)
        )
        self._layer: nn.Linear | None = layer if usable else None
        self._known: dict[frozenset[str], OutputHead | None] = {}

    def __call__(self, batch: Mapping[str, Any]) -> OutputHead | None:
        """The layer, if the logits of a batch are more than one chunk, and nothing but what it says.

        A few tokens of the first batch of a kind are run to see whether the logits, and the loss where there are
        labels, are those that would be computed from the layer's inputs.

        Args:
            batch: On the model's device.
        """
        ids, layer = batch.get("input_ids"), self._layer
        kind = frozenset(name for name, value in batch.items() if isinstance(value, Tensor))
        if layer is None or not kind <= _INPUTS or not isinstance(ids, Tensor) or ids.dim() != 2:
            return None
        labels = batch.get("labels", ids)
        if ids.numel() * len(layer.weight) <= chunked_logits.CHUNK or labels.shape != ids.shape:
            return None
        if kind not in self._known and (sample := _sample(batch)) is not None:
            with torch.no_grad():
                self._known[kind] = _tried(self._model, layer, sample, self._run)
        return self._known.get(kind)


def join_windows(of_windows: Sequence[dict[str, list[Tensor]]]) -> dict[str, list[Tensor]]:
    """By target, (tokens,) of each call in a batch whose windows ran one after the other."""
    if len(of_windows) == 1:
        return of_windows[0]
    joined: dict[str, list[Tensor]] = {}
    for name in dict.fromkeys(itertools.chain(*of_windows)):
        # Calls of experts may be fewer in one window than in another: nobody asks for their tokens one by one.
        joined[name] = [torch.cat(calls) for calls in zip(*(found.get(name, []) for found in of_windows), strict=False)]
    return joined


def _sample(batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """A few tokens of a batch without padding, with labels if the batch has some, one of which does not count."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        longest = int(mask.count_nonzero(1).argmax())
        ids = ids[longest][mask[longest] != 0]
    ids = ids.reshape(-1)[None, :_TOKENS]  # (1, tokens)
    if ids.shape[1] < 4:
        return None
    others = {name: value for name, value in batch.items() if not isinstance(value, Tensor)}
    sample = {**others, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "labels" in batch:
        sample["labels"] = ids.clone().index_fill_(1, ids.new_tensor([2]), IGNORED)
    return sample


def _tried(model: nn.Module, layer: nn.Linear, sample: Mapping[str, Any], run: Run) -> OutputHead | None:
    """The output layer of a model whose logits of a sample are that layer's outputs, whatever these are.

    Besides the sample's own logits, which may be small, large random ones take their place, so that a cap shows.
    """
    outputs = run(sample)
    dtype = layer.weight.dtype
    shape = (*sample["input_ids"].shape, len(layer.weight))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * _LARGE
    noise = noise.to(sample["input_ids"].device, dtype)
    states, probed = _run_without(layer, run, _without_labels(sample), noise)
    tensors = [named_logits(outputs), named_logits(probed)]
    if states is None or any(len(found) != 1 or found[0].shape != shape for found in tensors):
        return None
    (logits,), (after,) = tensors
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = float(getattr(text, "final_logit_softcapping", None) or 0)
    scale = float((noise.float() * after.float()).sum() / noise.float().square().sum())
    for head in (OutputHead(layer), OutputHead(layer, cap=cap), OutputHead(layer, scale=scale)):
        if not _close(head.rescaled(noise), after, dtype) or not _close(head.logits(states), logits, dtype):
            continue
        if "labels" not in sample:
            return head
        total, count = head.cross_entropy(run, sample)
        loss = getattr(outputs, "loss", None)
        return head if isinstance(loss, Tensor) and _close(total / count, loss, dtype) else None
    return None


def _run_without(layer: nn.Module, run: Run, batch: Mapping[str, Any], noise: Tensor | None = None) -> Any:
    """What an output layer reads in a run, and the model's output when it returns something else.

    Args:
        layer: The layer.
        run: Runs the model.
        batch: Without labels.
        noise: What the layer returns; None for a few of its inputs, where nobody looks at the logits.

    Returns:
        (batch, seq, hidden), or None unless the layer is called once with a row for each token; and the output.
    """
    read: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        read.append(x)
        return x[..., :1] if noise is None else noise

    with replaced_forward(layer, forward):
        output = run(batch)
    once = len(read) == 1 and read[0].dim() == 3 and read[0].shape[:2] == batch["input_ids"].shape
    return (read[0] if once else None), output


def _without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def _close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= _TOLERANCE.get(dtype, 0.0) * b.abs().max())
