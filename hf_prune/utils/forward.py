"""Run a model on one batch: eval mode, on its device, no cache, no unused logits."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_prune.errors import CalibrationError, HfPruneError
from hf_prune.utils.wrapping import check_is_model, sole_model, unwrapped

_MAKE = "calibration=hf_prune.text_batches(texts, tokenizer) makes batches from texts"
_DECODER_KEYS = {"labels", "decoder_input_ids", "decoder_inputs_embeds", "decoder_outputs", "decoder_features"}
# What models raise on unsuitable inputs. Other exceptions pass, such as one by which a hook stops the forward pass.
_INPUT_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_AUTOCASTS = ("cpu", "cuda", "mps", "xpu")  # kinds of devices that have one
_OPTION = re.compile(r"output_.*|return_.*|use_cache|kwargs|args|logits_to_keep|past_key_values|cache|cache_position")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the context; afterwards every module has its own mode again.

    Raises:
        ModelTypeError: If it is not a model.
    """
    check_is_model(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def without_autocast() -> Iterator[None]:
    """Inside, products have the precision of what is multiplied, whatever autocast is on outside."""
    with contextlib.ExitStack() as stack:
        for device in filter(torch.is_autocast_enabled, _AUTOCASTS):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def batch_to_device(model: nn.Module, batch: object, device: torch.device | None = None) -> dict[str, Any]:
    """A batch as keyword arguments on the model's device; a decoder without inputs gets the text of the encoder.

    Args:
        model: The model.
        batch: Its inputs by name.
        device: The model's device, if it is known.

    Raises:
        CalibrationError: If the batch is not a mapping with tensors, or the decoder cannot read the encoder's text.
    """
    if not isinstance(batch, Mapping):
        raise CalibrationError(
            f"a calibration batch is a {type(batch).__name__}: expected a dict of model inputs; {_MAKE}"
        )
    if not any(isinstance(value, Tensor) for value in batch.values()):
        raise CalibrationError(
            f"a calibration batch holds no tensors (found: {', '.join(map(str, batch)) or 'nothing'}): expected model "
            f"inputs; {_MAKE}"
        )
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.any()):
        raise CalibrationError(
            f"a calibration batch is nothing but padding (attention_mask {tuple(mask.shape)} is 0 everywhere): "
            f"expected at least one token; leave out empty texts"
        )
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() < 2:
        raise CalibrationError(
            f"a calibration batch holds input_ids of shape {tuple(ids.shape)}: expected (batch, seq); {_MAKE}"
        )
    device = device_of(model) if device is None else device
    inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    return {**inputs, **_decoder_inputs(model, inputs)} if _lacks_decoder_inputs(model, inputs) else inputs


def run_model(model: nn.Module, inputs: Mapping[str, Any], error_class: type[HfPruneError] = CalibrationError) -> Any:
    """Run a model on a batch and return its output. The batch is passed by name, or as one mapping.

    Args:
        model: The model.
        inputs: Its keyword arguments.
        error_class: The class of the error to raise.

    Raises:
        HfPruneError: An ``error_class`` if the model cannot take the batch; it names what the batch holds and what the
            model expects.
    """
    try:
        return model(dict(inputs)) if _takes_features(model, inputs) else model(**inputs)
    except (HfPruneError, torch.OutOfMemoryError):
        raise
    except _INPUT_ERRORS as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        takes = [name for name in inspect.signature(model.forward).parameters if not _OPTION.fullmatch(name)]
        contents = [
            f"{k} {tuple(v.shape)}" if isinstance(v, Tensor) else k
            for k, v in inputs.items()
            if not _OPTION.fullmatch(k)
        ]
        hint = ""
        if is_encoder_decoder(model) and not _DECODER_KEYS & inputs.keys():
            hint = "; it has a decoder, so add labels or decoder_input_ids to each batch"
        holder = unwrapped(model)
        if (inner := sole_model(holder)) is not holder:
            name = next(name for name, module in holder.named_modules() if module is inner)
            hint = f"; or pass what it holds as {name!r}, a {type(inner).__name__}, whose masks are those of the whole"
        raise error_class(
            f"{type(model).__name__} cannot run a batch of {', '.join(contents)} ({type(error).__name__}: {reason}): "
            f"expected what its forward takes, {', '.join(takes)}{hint}"
        ) from error


def _takes_features(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a module around a model takes the whole batch as one argument, as a ``SentenceTransformer`` does."""
    parameters = inspect.signature(model.forward).parameters
    pieces = [
        p for p in parameters.values() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return len(pieces) == 1 and not inputs.keys() & parameters.keys() and sole_model(model) is not model


def _lacks_decoder_inputs(model: nn.Module, batch: object) -> bool:
    """Whether a batch has a text for the encoder and no inputs for the decoder."""
    if not is_encoder_decoder(model) or not isinstance(batch, Mapping) or _DECODER_KEYS & batch.keys():
        return False
    ids = batch.get("input_ids")
    known = inspect.signature(model.forward).parameters
    return isinstance(ids, Tensor) and ids.dim() == 2 and "decoder_input_ids" in known


def is_encoder_decoder(model: object) -> bool:
    """Whether a model has a decoder beside an encoder, as its config says."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def generates(model: object) -> bool:
    """Whether a model is a causal language model: one that continues what it reads."""
    return bool(getattr(model, "can_generate", bool)()) and not is_encoder_decoder(model)


def _decoder_inputs(model: Any, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The encoder's text as decoder inputs: shifted right by one token, after the start token."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    tables = [part.get_input_embeddings() for part in (model.get_encoder(), model.get_decoder())]
    sizes = [getattr(table, "num_embeddings", None) for table in tables]
    shifted = _shifted(model, ids) if sizes[0] == sizes[1] else None
    if shifted is None:
        vocabularies = f"its encoder knows {sizes[0]} tokens and its decoder {sizes[1]}"
        why = "its config names no start token" if sizes[0] == sizes[1] else vocabularies
        raise CalibrationError(
            f"a calibration batch holds {', '.join(inputs)}, and the decoder of {type(model).__name__} cannot read the "
            f"same text, since {why}: add labels or decoder_input_ids to each batch"
        )
    return {"decoder_input_ids": shifted} | ({} if mask is None else {"decoder_attention_mask": mask})


def _shifted(model: Any, ids: Tensor) -> Tensor | None:
    """Ids (batch, seq) shifted right, as the model turns labels into decoder inputs; None without a start token."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        with contextlib.suppress(ValueError):  # where the config names no first token
            return model.prepare_decoder_input_ids_from_labels(labels=ids)
    settings = [model.config, getattr(model.config, "decoder", None)]
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    start = next((token for n in names for c in settings if isinstance(token := getattr(c, n, None), int)), None)
    return None if start is None else torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in the output of a model, however it nests them, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(value)


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first loaded weight; the CPU if none is loaded."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def no_cache(model: nn.Module) -> dict[str, Any]:
    """Arguments that keep a language model from caching keys and values."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def cache_argument(model: nn.Module) -> str:
    """What a model calls the cache that it continues, as an argument and an output: it differs in transformers 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def no_logits(model: nn.Module, targets: set[str]) -> dict[str, Any]:
    """Arguments that make a language model compute few logits, unless its output embedding is a target."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if "logits_to_keep" not in inspect.signature(model.forward).parameters or head is None:
        return {}
    names = {name for name, parameter in model.named_parameters() if any(parameter is p for p in head.parameters())}
    return {} if names & targets else {"logits_to_keep": 1}
