"""Fewer dimensions of the hidden states: one choice for the whole model, cut out of matrices, norms and embeddings.

Which dimension of which parameter is one of the hidden states is what the class of the model says: those are the ones
that are smaller in a model built from a config with a smaller hidden size. What that model then computes is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.architectures.find_unit_groups import find_unit_groups
from hf_prune.calibration.batches import NO_BATCHES, Batches, without_labels
from hf_prune.calibration.padding import Padding, first_tensor
from hf_prune.calibration.read import CalibrationData, read_calibration
from hf_prune.errors import CalibrationError, PlanError
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.structured.hidden.cuts import (
    built_models,
    checked_size,
    cut_tensors,
    find_cuts,
    hidden_size,
    new_settings,
    refused,
)
from hf_prune.structured.hidden.proof import greatest_difference, is_close, norms_of
from hf_prune.structured.shrink_record import RECORD
from hf_prune.utils.distributed import all_reduce_sum, check_same_batches, fail_together, rank_items
from hf_prune.utils.forward import batch_to_device, device_of, eval_mode, no_cache, run_model
from hf_prune.utils.number_formats import refuse_quantized
from hf_prune.utils.offloaded_weights import refuse_offloaded
from hf_prune.utils.progress import Bar
from hf_prune.utils.results import Result
from hf_prune.utils.wrapping import without_wrappers


@dataclass(frozen=True, repr=False)
class HiddenResult(Result):
    """What :func:`trim_hidden` did.

    Args:
        model: The class of the model.
        before: How many dimensions its hidden states had.
        kept: Numbers of those that stayed, rising.
        parameters_before: Parameters that the model had, tied ones counted once.
        parameters: Parameters that are left.
        difference: How far a model built from the new config was from what it has to compute, on the first batch, as a
            share of the largest value; at most 1e-5.
    """

    bars = ("parameters", "parameters_before")

    model: str
    before: int
    kept: tuple[int, ...]
    parameters_before: int
    parameters: int
    difference: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "kept": list(self.kept), "size": len(self.kept)}

    def __str__(self) -> str:
        """One sentence."""
        share = 100 * self.parameters / self.parameters_before
        return (
            f"{self.model}: {len(self.kept):,} of {self.before:,} dimensions of the hidden states stay, and "
            f"{self.parameters:,} of {self.parameters_before:,} parameters ({share:.1f} %)."
        )


@torch.no_grad()
def trim_hidden(
    model: Any,
    size: int | float,
    *,
    calibration: CalibrationData,
    tokenizer: Any = None,
    progress: bool | None = None,
) -> HiddenResult:
    """Remove dimensions of the hidden states from a model, in place: the same ones everywhere, embeddings included.

    Those stay that are largest behind the norms: the mean of the absolute values over all tokens, added up over all
    norms of hidden states (Minitron: Muralidharan et al. 2024, arXiv:2407.14679). ``config.hidden_size`` becomes
    smaller, the size of the heads stays, and plain transformers loads the result. Without training, much is lost:
    this is a start for distillation.

    What is left computes exactly what the dense model does if nothing writes into the other dimensions and its norms
    see those that stay alone: an RMSNorm divides by the mean square of these. (With zeros in a model of the old size,
    the norms would count the zeros.) Before anything changes, both are computed in float32 on the first batch and
    compared, which takes twice the memory of a model in float32.

    Args:
        model: A transformers model with one hidden size and no masks, such as Llama, Mistral, Qwen2 or Qwen3.
        size: How many dimensions stay, or which share of them, between 0 and 1; a share is rounded up to a number that
            the config accepts, which is often a multiple of the number of heads.
        calibration: Texts or batches, see :func:`hf_prune.prune`.
        tokenizer: Reads texts; by default the one in the folder that the model was loaded from.
        progress: Show a progress bar.

    Raises:
        ConfigError: If the size is out of range, or the config does not accept it.
        PlanError: If the model has masks, its weights are offloaded, or it is quantized.
        ArchitectureError: If its class cannot build such a model without changing the size of the heads, or the one
            that it builds computes something else. After any error, the model is as it was.
        CalibrationError: If the batches are unusable.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> result = trim_hidden(model, 0.75, calibration={"input_ids": torch.arange(50)[None]})
        >>> model.config.hidden_size, len(result.kept), model.config.head_dim
        (24, 24, 8)
    """
    inner: Any = without_wrappers(model)
    before = hidden_size(inner)
    refuse_offloaded(inner, "trim_hidden()")
    refuse_quantized(inner)
    if MaskStore.of(inner) is not None:
        raise PlanError("the model has masks, which would no longer fit: trim it first, or drop_masks(model) first")
    groups = find_unit_groups(inner)
    size = checked_size(inner, size, before)
    with fail_together():
        batches = list(read_calibration(inner, calibration, tokenizer) or [])
        if not batches:
            raise CalibrationError(NO_BATCHES)
    check_same_batches(batches)
    parameters = inner.num_parameters()
    with eval_mode(inner), fail_together():
        values = new_settings(inner, groups, before, size)
        old, smaller = built_models(inner, values)
        cuts = find_cuts(inner, smaller, groups, before, size)
        scores = _importance(inner, list(norms_of(inner, cuts).values()), batches, before, progress)
        kept = scores.sort(descending=True, stable=True).indices[:size].sort().values
        tensors = cut_tensors(inner, cuts, kept)
        smaller.load_state_dict({name: _in_float32(tensors[name]) for name in smaller.state_dict()}, assign=True)
        smaller.tie_weights()
        smaller.to(device_of(inner))
        inputs = {**no_cache(inner), **without_labels(inner, batch_to_device(inner, batches[0]))}
        difference = greatest_difference(inner, smaller, cuts, kept, inputs)
        if not is_close(difference):
            raise refused(
                inner,
                size,
                f"the model that its class builds differs from what it should compute by {difference:.2g} of the "
                f"largest output, so something in it depends on the hidden size in another way (Gemma multiplies its "
                f"embeddings by the root of it)",
            )
    _adopt(inner, old, smaller, tensors)
    _write_config(inner.config, values, before)
    return HiddenResult(
        type(inner).__name__, before, tuple(kept.tolist()), parameters, inner.num_parameters(), difference
    )


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _importance(
    model: nn.Module, norms: Sequence[nn.Module], batches: Batches, size: int, progress: bool | None
) -> Tensor:
    """(size,) the mean absolute outputs of norms over the tokens, added up over the norms."""
    if not norms:
        raise refused(model, size, "no norm of its hidden states has weights, so that none could tell what matters")
    sums = torch.zeros(len(norms), size, dtype=torch.float64)
    tokens = torch.zeros(len(norms), 1, dtype=torch.float64)
    padding = Padding(model)

    def adder(number: int) -> Callable[[nn.Module, Any, Any], None]:
        def add(module: nn.Module, args: Any, output: Any) -> None:
            rows = padding.rows(module, first_tensor(output))  # (tokens, size)
            sums[number] += rows.float().abs().sum(0).double().cpu()
            tokens[number] += len(rows)

        return add

    with ExitStack() as hooks:
        for number, norm in enumerate(norms):
            hooks.callback(norm.register_forward_hook(adder(number)).remove)
        for batch in Bar(rank_items(list(batches)), desc="Hidden states", progress=progress):
            inputs = without_labels(model, batch_to_device(model, batch))
            with padding.of(inputs):
                run_model(model, {**no_cache(model), **inputs})
    scores = (all_reduce_sum(sums) / all_reduce_sum(tokens).clamp_min(1)).sum(0)
    if not bool(torch.isfinite(scores).all()):
        raise CalibrationError("the model's hidden states are not finite on the calibration data: nothing was changed")
    return scores


# --- the change ------------------------------------------------------------------------------------


def _adopt(model: nn.Module, old: nn.Module, smaller: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Take over tensors, and those attributes of modules that differ between models built for both sizes."""
    before = dict(old.named_modules())
    for name, parameter in model.named_parameters():
        if parameter.shape != tensors[name].shape:
            parameter.data, parameter.grad = tensors[name], None
    for name, module in smaller.named_modules():
        target = model.get_submodule(name)
        for key, value in vars(module).items():
            if isinstance(value, int | float | tuple) and vars(before[name]).get(key) != value:
                setattr(target, key, value)
        for key, buffer in module._buffers.items():
            current = target._buffers.get(key)
            if buffer is not None and current is not None and buffer.shape != current.shape:
                target._buffers[key] = tensors.get(f"{name}.{key}".lstrip("."), buffer.to(current.dtype))


def _write_config(config: Any, values: Mapping[str, int], before: int) -> None:
    """Write the settings, and into the record of a shrunk model that its hidden states were larger."""
    for key, value in values.items():
        setattr(config, key, value)
    if (record := getattr(config, RECORD, None)) is not None:
        first = record.get("hidden_size", {}).get("before", before)
        setattr(config, RECORD, {**record, "hidden_size": {"before": first, "kept": values["hidden_size"]}})
