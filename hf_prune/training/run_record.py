"""The facts that identify a training: its settings, data and model, as plain values that can be compared."""

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

# Of a model's config: where it came from, and what the Trainer or a forward pass with labels fills in.
_NO_SETTINGS = ("_name_or_path", "transformers_version", "architectures", "problem_type", "use_cache", "dtype")
# Arguments that say where things go, what is shown or scored, and how fast it is. Every other argument counts, also
# those that later versions of transformers or TRL add.
_WITHOUT_EFFECT = (
    *("output_dir", "logging_", "log_", "report_to", "run_name", "project", "trackio_", "disable_tqdm", "debug"),
    *("eval_", "do_", "per_device_eval_", "prediction_loss_only", "batch_eval_", "include_", "bf16_full_"),
    *("fp16_full_", "save_", "push_to_hub", "hub_", "load_best_", "metric_for_best_", "greater_is_better"),
    *("enable_jit_checkpoint", "resume_from_checkpoint", "restore_callback_", "ignore_data_skip", "local_rank"),
    *("ddp_", "fsdp", "deepspeed", "parallelism_config", "use_cpu", "skip_memory_metrics", "torch_compile"),
    *("torch_empty_cache_", "use_cache", "activation_checkpointing", "gradient_checkpointing", "full_determinism"),
    *("remove_unused_columns", "label_names", "dataloader_num_", "dataloader_pin_", "dataloader_persistent_"),
    *("dataloader_prefetch_", "dataloader_multi"),
)
_SAMPLES = 32  # examples of a data set, and numbers of a large tensor, that a digest looks at
_PLAIN = (bool, int, float, str, type(None))


def argument_facts(args: Any) -> dict[str, Any]:
    """The training arguments that change the result."""
    values = args.to_dict()
    facts = {name: value for name, value in values.items() if not name.startswith(_WITHOUT_EFFECT)}
    return {**facts, "processes": args.world_size, "train_batch_size": args.train_batch_size}


def config_facts(model: Any) -> dict[str, Any]:
    """The settings of a model, such as its dropout."""
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    return {"class": type(model).__name__, **{k: v for k, v in values.items() if k not in _NO_SETTINGS}}


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Settings of a model, and a digest of some numbers of each weight; every process has to call this.

    Weights that FSDP2 has sharded are put together one by one, and give the same digest as whole ones. Of other weights
    only the first process makes a digest, since the others may have loaded none: there it is None.
    """
    tensors = {plain_name(name): tensor.data for name, tensor in model.named_parameters()}
    reads = rank_and_world_size()[0] == 0 or any(isinstance(t, DTensor) for t in tensors.values())
    whole = reads and not any(t.is_meta or type(t) not in (Tensor, DTensor) for t in tensors.values())
    return {"weights": _digest(tensors) if whole else None, "model config": config_facts(model)}


def data_facts(data: Any) -> dict[str, Any] | None:
    """Length of a data set, and a digest: of all that a list holds, or else of the first, the last and some examples.

    Only the length if examples change whenever they are read, as with random augmentation; only the type of a stream.

    Args:
        data: The data set, None if there is none. The states of random number generators stay as they are.
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
    """All facts that a training must share with a checkpoint to resume from it.

    Args:
        args: The ``TrainingArguments``.
        model: The model before the first step.
        data: The training data.
        tokenizer: The processing class, if there is one.
        collator: The data collator.
        optimizer: The optimizer, if the user passed one.
        teacher: The teacher, if there is one.
        **more: Further plain values.
    """
    groups = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in getattr(optimizer, "param_groups", ())]
    settings = {k: v for k, v in getattr(collator, "__dict__", {}).items() if isinstance(v, _PLAIN)}
    return {
        "arguments": argument_facts(args),
        **model_facts(model),
        "data": data_facts(data),
        "tokenizer": tokenizer_facts(tokenizer),
        "collator": {"type": getattr(collator, "__name__", type(collator).__name__), **settings},
        "optimizer": None if optimizer is None else {"type": type(optimizer).__name__, "groups": repr(groups)},
        "teacher": None if teacher is None else model_facts(teacher)["weights"],
        **more,
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What differs: name, value before, value now. In nested mappings only keys that both have are compared."""
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
        if all(type(item) is int for item in value):  # token ids: the same as one by one, and faster
            update(("int %d;" * len(value) % tuple(value)).encode())
            return
        for item in value:
            _feed(item, update)
    elif isinstance(value, (*_PLAIN, bytes)):
        update(f"{type(value).__name__} {value!r};".encode())
    else:
        update(type(value).__qualname__.encode())  # an unknown object
