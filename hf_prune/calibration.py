"""Calibration: batches through the dense model, statistics of its targets out."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_prune.activations import NO_BATCHES, Batches, InputReader, eval_mode, on_device
from hf_prune.config import check_positive
from hf_prune.criteria.base import GRADIENTS, INPUTS, WeightStats
from hf_prune.distributed import add_up, all_or_none, check_same_batches, processes, share
from hf_prune.errors import CalibrationError, DataError
from hf_prune.plan import PruningPlan
from hf_prune.sums import sum_dtype
from hf_prune.targets import is_finite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_batches(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 32, max_length: int = 128
) -> list[dict[str, Tensor]]:
    """Unlabelled texts as padded batches, for criteria and repairs that learn from the inputs of each layer.

    Args:
        texts: A list of texts, or a column of a data set.
        tokenizer: A tokenizer with a padding token.
        batch_size: Texts per batch; the last batch may be smaller.
        max_length: Longer texts are cut to this many tokens, or to what the tokenizer allows if that is less.

    Returns:
        Batches on the CPU with what the tokenizer makes: ``input_ids`` and ``attention_mask`` (batch, seq), int64.
        Short texts come first, so that texts of about the same length share a batch and little of it is padding.

    Raises:
        ConfigError: If ``batch_size`` or ``max_length`` is below 1.
        DataError: If there are no texts, one is no string, or the tokenizer has no padding token.

    Example:
        >>> batches = text_batches(["a good film", "a bad one"], tokenizer)  # doctest: +SKIP
        >>> hf_prune.prune(model, 0.5, criterion="sparsegpt", calibration=batches)  # doctest: +SKIP
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        check_positive(name, value)
    found = _checked_texts(texts)
    if tokenizer.pad_token is None:
        raise DataError(
            "the tokenizer has no padding token: set one, for instance tokenizer.pad_token = tokenizer.eos_token"
        )
    found.sort(key=len)
    length = min(max_length, tokenizer.model_max_length)

    def encode(part: Sequence[str]) -> dict[str, Tensor]:
        return dict(tokenizer(part, padding=True, truncation=True, max_length=length, return_tensors="pt"))

    return [encode(found[start : start + batch_size]) for start in range(0, len(found), batch_size)]


def token_windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    n: int = 128,
    length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    labels: bool = False,
) -> list[dict[str, Tensor]]:
    """Full windows of joined text as batches, to calibrate causal language models without padding.

    The texts become one row of tokens (see :func:`joined_tokens`), which is cut in consecutive windows; some are
    drawn. SparseGPT (Frantar and Alistarh 2023, arXiv:2301.00774) and its followers calibrate on 128 windows of 2048
    tokens.

    Args:
        texts: A list of texts, or a column of a data set.
        tokenizer: The model's tokenizer.
        n: How many windows, drawn without replacement; all if there are fewer.
        length: Tokens of a window; what the tokenizer allows if that is less.
        batch_size: Windows per batch; the last batch may be smaller.
        seed: The same seed draws the same windows in the same order.
        labels: Also give ``labels``, the tokens themselves, for criteria that need gradients.

    Returns:
        Batches on the CPU: ``input_ids`` and ``attention_mask`` (batch, length), int64, the latter all 1.

    Raises:
        ConfigError: If ``n``, ``length`` or ``batch_size`` is below 1.
        DataError: If there are no texts, one is no string, or they are too short for one window.

    Example:
        >>> batches = token_windows(load_texts("wiki.train.raw"), tokenizer, n=64)  # doctest: +SKIP
        >>> hf_prune.prune(model, 0.5, criterion="sparsegpt", calibration=batches)  # doctest: +SKIP
    """
    for name, value in (("n", n), ("length", length), ("batch_size", batch_size)):
        check_positive(name, value)
    length = min(length, tokenizer.model_max_length)
    tokens = joined_tokens(texts, tokenizer)
    count = len(tokens) // length
    if count == 0:
        raise DataError(
            f"the texts have {len(tokens):,} tokens: expected at least the {length:,} of one window; pass more text, "
            f"or a smaller length"
        )
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:n]
    windows = tokens[: count * length].view(count, length)[drawn]
    batches = []
    for ids in windows.split(batch_size):
        batch = {"input_ids": ids.clone(), "attention_mask": torch.ones_like(ids)}
        batches.append({**batch, "labels": ids.clone()} if labels else batch)
    return batches


def joined_tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    r"""Texts as one row of tokens, as perplexities on WikiText-2 are published.

    The texts are joined by ``"\n\n"`` and tokenised once. So a token that opens a text for this tokenizer (BOS)
    stands at the start of the row only.

    Args:
        texts: A list of texts, or a column of a data set.
        tokenizer: Any tokenizer.

    Returns:
        (tokens,) int64, on the CPU.

    Raises:
        DataError: If there are no texts, or one is no string.
    """
    joined = "\n\n".join(_checked_texts(texts))
    return torch.tensor(tokenizer(joined, truncation=False, verbose=False)["input_ids"], dtype=torch.int64)


def _checked_texts(texts: Iterable[str]) -> list[str]:
    found = [] if isinstance(texts, str) else list(texts)
    if not found:
        raise DataError(f"texts is {texts!r}: expected a list of texts, at least one")
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise DataError(f"text {i} is {text!r}: expected a string")
    return found


def collect_stats(
    model: nn.Module, plan: PruningPlan, calibration: Batches | None = None, progress: bool = False
) -> dict[str, WeightStats]:
    """Gather what the plan needs to know of every target, on the model as it is.

    Statistics of the inputs are gathered for all targets at once, whatever the plan's ``calibration_order``; see
    :func:`hf_prune.sequential.prune_in_order` for the other one.

    Args:
        model: The model; its weights, gradients and modes are as before afterwards.
        plan: Which targets and which criterion.
        calibration: Mappings of tensors that the model takes as keyword arguments, as a DataLoader yields them;
            with labels where gradients are needed. Only read if the plan needs them.
        progress: Show a progress bar.

    Returns:
        Statistics by parameter name; matrices are canonical (out, in).

    Raises:
        CalibrationError: If batches are needed and missing, empty, without labels, or give a loss or
            gradients that are not finite.
    """
    needs = plan.needs
    found: dict[str, dict[str, Tensor]] = {t.target.name: {} for t in plan.tensors}
    if needs:
        batches = require_batches(plan, calibration)
        if needs & GRADIENTS and needs & INPUTS:
            batches = list(batches)  # read twice
        if gradients := needs & GRADIENTS:
            with eval_mode(model):
                sums = _gradients(model, plan, batches, gradients, progress)
            for t in plan.tensors:
                for need, tensors in sums.items():
                    found[t.target.name][need] = t.target.matrix(tensors[t.target.name])
        if inputs := needs & INPUTS:
            with InputReader(model, plan, batches) as reader:
                reader.order()
                for name, tensors in reader.gather(plan.tensors, inputs, progress=progress).items():
                    found[name].update(tensors)
    return {name: WeightStats(seed=weight_seed(plan, name), **values) for name, values in found.items()}


def weight_seed(plan: PruningPlan, name: str) -> int:
    """A weight's own seed, from the config's seed and the parameter's name."""
    return zlib.crc32(f"{plan.config.seed}:{name}".encode())


def require_batches(plan: PruningPlan, calibration: Batches | None) -> Batches:
    """The batches, if there are any; the same ones in every process.

    Raises:
        CalibrationError: If there are none, or the processes have different ones.
    """
    with all_or_none():
        found = _require_batches(plan, calibration)
    check_same_batches(found)
    return found


def _require_batches(plan: PruningPlan, calibration: Batches | None) -> Batches:
    if calibration is None:
        config = plan.config
        who = f"criterion {config.criterion!r}" if plan.criterion.needs else f"repair={config.repair!r}"
        who = who if plan.needs else f"allocation={config.allocation!r}"
        labels = " and labels" if plan.needs & GRADIENTS else ""
        raise CalibrationError(
            f"{who} needs calibration data, and got none: pass calibration=batches, "
            f"an iterable of dicts with the model's inputs{labels}"
        )
    return calibration if processes()[1] == 1 else list(calibration)


def _gradients(
    model: nn.Module, plan: PruningPlan, calibration: Batches, needs: frozenset[str], progress: bool
) -> dict[str, dict[str, Tensor]]:
    """Mean gradients and mean absolute gradients of the targets, weighted by the examples in each batch."""
    parameters = dict(model.named_parameters())
    wanted = [t.target.name for t in plan.tensors]
    dtype = sum_dtype(parameters[wanted[0]].device)
    sums = {n: {name: torch.zeros_like(parameters[name], dtype=dtype) for name in wanted} for n in needs}
    examples = 0
    required = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in sums[next(iter(needs))])
        hidden = None if progress else True  # None: shown on a terminal
        with all_or_none():
            for batch in tqdm(share(calibration), desc="Calibrating", unit="batch", leave=False, disable=hidden):
                size, loss = _loss(model, batch)
                batch_gradients = torch.autograd.grad(loss, [parameters[name] for name in wanted], allow_unused=True)
                examples += size
                for name, gradient in zip(wanted, batch_gradients, strict=True):
                    if gradient is None:
                        continue
                    if "gradient" in sums:
                        sums["gradient"][name].add_(gradient, alpha=size)
                    if "absolute_gradient" in sums:
                        sums["absolute_gradient"][name].add_(gradient.abs(), alpha=size)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(required[name])
    examples = int(add_up(torch.tensor(examples)))
    if examples == 0:
        raise CalibrationError(NO_BATCHES)
    for tensors in sums.values():
        for name, tensor in tensors.items():
            tensors[name] = add_up(tensor).div_(examples).float()
            if not is_finite(tensors[name]):
                raise CalibrationError(
                    f"the gradient of {name} is not finite: expected finite values; calibrate in float32 or bfloat16, "
                    f"and check the batches"
                )
    return sums


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[int, Tensor]:
    inputs = on_device(model, batch)
    with torch.enable_grad():
        loss = getattr(model(**inputs), "loss", None)
    if loss is None:
        raise CalibrationError(
            f"the model returned no loss for a batch with {', '.join(sorted(inputs))}: "
            f"expected the labels among them, usually under 'labels'"
        )
    if not torch.isfinite(loss):
        raise CalibrationError(f"the loss of a calibration batch is {loss.item()}: expected a finite number")
    if not loss.requires_grad:
        raise CalibrationError(
            "the loss of a calibration batch depends on none of the weights to be pruned: check target_modules, and "
            "that the model computes with gradients"
        )
    return len(_batched(inputs)), loss


def _batched(inputs: Mapping[str, Any]) -> Tensor:
    """An input whose first dimension counts the examples: the labels, or else the first tensor."""
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.dim() > 0}
    if not tensors:
        raise CalibrationError(
            f"a calibration batch holds no tensors (found: {', '.join(inputs)}): expected model inputs"
        )
    return tensors.get("labels", next(iter(tensors.values())))
