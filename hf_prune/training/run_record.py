"""What makes a training the one that it is: settings, data and model, as plain values that can be compared."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_prune.utils.distributed import rank_and_world_size
from hf_prune.utils.wrapping import plain_name

# of a model's config: where it came from, and what the Trainer or a forward pass with labels fills in
_NO_SETTINGS = ("_name_or_path", "transformers_version", "architectures", "problem_type", "use_cache", "dtype")
# Arguments that say where things go, what is shown or scored, and how fast it all is. Whatever else there is, now or in
# a later version of transformers or TRL, counts.
_INDIFFERENT = (
    *("output_dir", "logging_", "log_", "report_to", "run_name", "project", "trackio_", "disable_tqdm", "debug"),
    *("eval_", "do_", "per_device_eval_", "prediction_loss_only", "batch_eval_", "include_", "bf16_full_"),
    *("fp16_full_", "save_", "push_to_hub", "hub_", "load_best_", "metric_for_best_", "greater_is_better"),
    *("enable_jit_checkpoint", "resume_from_checkpoint", "restore_callback_", "ignore_data_skip", "local_rank"),
    *("ddp_", "fsdp", "deepspeed", "parallelism_config", "use_cpu", "skip_memory_metrics", "torch_compile"),
    *("torch_empty_cache_", "use_cache", "activation_checkpointing", "gradient_checkpointing", "full_determinism"),
    *("remove_unused_columns", "label_names", "dataloader_num_", "dataloader_pin_", "dataloader_persistent_"),
    *("dataloader_prefetch_", "dataloader_multi"),
)
_SAMPLES = 32  # of a data set, and numbers of a tensor, that are looked at
_PLAIN = (bool, int, float, str, type(None))


def argument_facts(args: Any) -> dict[str, Any]:
    """The training arguments that change the result."""
    values = args.to_dict()
    facts = {name: value for name, value in values.items() if not name.startswith(_INDIFFERENT)}
    return {**facts, "processes": args.world_size, "train_batch_size": args.train_batch_size}


def config_facts(model: Any) -> dict[str, Any]:
    """The settings of a model, such as its dropout."""
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return {"class": type(model).__name__, **{k: v for k, v in values.items() if k not in _NO_SETTINGS}}


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Settings of a model, and a digest of some numbers of each weight; every process calls this.

    Weights that FSDP2 has spread over the processes are put together one by one, and are told as if they were whole.
    Other weights are told by the first process alone, since the others may load none; what is told nowhere is None.
    """
    tensors = {plain_name(name): tensor.data for name, tensor in model.named_parameters()}
    told = rank_and_world_size()[0] == 0 or any(isinstance(t, DTensor) for t in tensors.values())
    whole = told and not any(t.is_meta or type(t) not in (Tensor, DTensor) for t in tensors.values())
    return {"weights": _digest(tensors) if whole else None, "model config": config_facts(model)}


def data_facts(data: Any) -> dict[str, Any] | None:
    """Length of a data set, and a digest: of all that a list holds, or else of the first, the last and some samples.

    Only the length if samples are drawn anew each time, and only the type if they come in a stream.

    Args:
        data: What samples are taken from, None if there is nothing. The states of random numbers stay as they are.
    """
    if data is None:
        return None
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        return {"type": type(data).__name__}
    n = len(data)
    if isinstance(data, (list, tuple)):
        return {"length": n, "contents": _digest(data)}
    rows = sorted({i * (n - 1) // (_SAMPLES - 1) for i in range(_SAMPLES)}) if n else []
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=[]):
        digests = {_digest([data[row] for row in rows]) for _ in range(2)}
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    return {"length": n, "samples": digests.pop() if len(digests) == 1 else None}


def tokenizer_facts(tokenizer: Any) -> str | None:
    """A digest of a vocabulary and its special tokens; None if there is no tokenizer."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    return _digest([sorted(tokenizer.get_vocab().items()), special, tokenizer.padding_side, tokenizer.truncation_side])


def run_facts(
    args: Any,
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    collator: Any = None,
    optimizer: Any = None,
    teacher: nn.Module | None = None,
    **more: Any,
) -> dict[str, Any]:
    """All that a training must share with a checkpoint to go on from it.

    Args:
        args: The ``TrainingArguments``.
        model: The model as it is before the first step.
        data: What it learns from.
        tokenizer: The processing class, if there is one.
        collator: What makes batches.
        optimizer: The optimizer, if it was handed in.
        teacher: What it learns from besides.
        **more: Plain values.
    """
    hyper = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in getattr(optimizer, "param_groups", ())]
    settings = {k: v for k, v in getattr(collator, "__dict__", {}).items() if isinstance(v, _PLAIN)}
    return {
        "arguments": argument_facts(args),
        **model_facts(model),
        "data": data_facts(data),
        "tokenizer": tokenizer_facts(tokenizer),
        "collator": {"type": getattr(collator, "__name__", type(collator).__name__), **settings},
        "optimizer": None if optimizer is None else {"type": type(optimizer).__name__, "groups": repr(hyper)},
        "teacher": None if teacher is None else model_facts(teacher)["weights"],
        **more,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What differs: name, value before, value now; in groups of settings, only those that both have are compared."""
    for name in dict.fromkeys([*now, *before]):
        old, new = before.get(name), now.get(name)
        if inside and not (name in before and name in now):
            continue  # another version of transformers
        if not inside and isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{name}: ")
        elif old != new:
            yield inside + name, old, new


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    _feed(value, digest.update)
    return digest.hexdigest()[:16]


def _feed(value: Any, update: Callable[[bytes], None]) -> None:
    if isinstance(value, Mapping):
        value = list(value.items())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = list(vars(value).items())
    elif isinstance(value, numpy.ndarray) and value.dtype.kind in "biufc":
        value = torch.as_tensor(numpy.ascontiguousarray(value))
    if isinstance(value, Tensor):
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        flat = whole.detach().flatten()
        picked = flat[:: max(1, flat.numel() // _SAMPLES)] if flat.numel() > 1 << 12 else flat
        update(f"{value.dtype} {tuple(value.shape)}".encode())
        update(picked.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        update(f"[{len(value)}".encode())
        if all(type(each) is int for each in value):  # token ids: the same as one by one, and faster
            update(("int %d;" * len(value) % tuple(value)).encode())
            return
        for each in value:
            _feed(each, update)
    elif isinstance(value, (*_PLAIN, bytes)):
        update(f"{type(value).__name__} {value!r};".encode())
    else:
        update(type(value).__qualname__.encode())  # an object of which nothing is known
