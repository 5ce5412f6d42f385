"""Wrappers around a model, and PEFT's adapters inside it."""

from __future__ import annotations

import contextlib
import os
import re
import reprlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_prune.errors import ModelTypeError

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # added to names by activation checkpointing and compile
_ADAPTED = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")  # added to names by PEFT


def check_is_model(model: object) -> None:
    """Make sure that an argument is a model, and not its name, config or pipeline.

    Raises:
        ModelTypeError: If it is not a ``torch.nn.Module``.
    """
    if isinstance(model, nn.Module):
        return
    found = f"found {reprlib.repr(model)}, of type {type(model).__name__}"
    if isinstance(model, str | os.PathLike):
        hint = f"load it first, with hf_prune.AutoPrunedModelFor….from_pretrained({reprlib.repr(os.fspath(model))})"
    elif isinstance(getattr(model, "model", None), nn.Module):  # a pipeline, or a trainer
        found, hint = f"found a {type(model).__name__}", "pass the model that it holds, its .model"
    elif hasattr(model, "model_type"):
        found, hint = f"found a {type(model).__name__}", "create a model from it, or load one with from_pretrained"
    else:
        hint = "load one with hf_prune.AutoPrunedModelFor….from_pretrained"
    raise ModelTypeError(f"{found}: expected a model, a torch.nn.Module; {hint}")


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``.

    Raises:
        ModelTypeError: If it is not a model.
    """
    check_is_model(model)
    while True:
        if isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Within this context, what ``torch.compile`` compiled runs as it is written.

    Hooks would be compiled too, each of them many times over.
    """
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and loading it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers and inside a ``PeftModel``; changes of it are changes of those as well.

    Of a model of sentence-transformers, that is the transformers model in it, if there is exactly one: what pools and
    projects its outputs stays as it is.
    """
    inner: Any = without_wrappers(model)
    while callable(getattr(type(inner), "get_base_model", None)):
        inner = without_wrappers(inner.get_base_model())
    if is_sentence_model(inner) and len(parts := outermost_models(inner)) == 1:
        return parts[0]
    return inner


def sole_model(module: nn.Module) -> nn.Module:
    """The only transformers model inside another module; the unwrapped module itself if there is not exactly one."""
    model = unwrapped(module)
    parts = outermost_models(model)
    return parts[0] if len(parts) == 1 else model


def outermost_models(module: nn.Module) -> list[nn.Module]:
    """The transformers models inside a module that are not inside another one; the module itself if it is one."""
    from transformers import PreTrainedModel

    parts = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    inside = {id(part) for outer in parts for part in list(outer.modules())[1:]}
    return [part for part in parts if id(part) not in inside]


def is_sentence_model(module: object) -> bool:
    """Whether a module is a model of sentence-transformers: ``SentenceTransformer``, ``CrossEncoder`` and the like."""
    return is_sentence_class(type(module))


def is_sentence_class(cls: type) -> bool:
    """Whether a class is one of the models of sentence-transformers."""
    library = sys.modules.get("sentence_transformers.base.model")  # without it, there is no such model
    return library is not None and issubclass(cls, library.BaseModel)


def plain_name(name: str) -> str:
    """The name of a parameter without the parts that wrappers inside a model add."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def unadapted_name(name: str) -> str:
    """The name that a module or parameter has without adapters, or after they are merged."""
    return _ADAPTED.sub("", name)


def adapters(model: nn.Module) -> dict[nn.Module, str]:
    """The modules inside a model that hold PEFT's trainable weights, with the name of the layer that they adapt.

    These are the matrices of LoRA and similar methods, and the copies that ``modules_to_save`` makes. The adapted
    layers and the originals of the copies belong to the model.
    """
    if "peft" not in sys.modules:
        return {}
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    # In each class of PEFT, the child that belongs to the model; all other children are adapters.
    kept = {PeftModel: "base_model", BaseTuner: "model", BaseTunerLayer: "base_layer"}
    kept |= {AuxiliaryTrainingWrapper: "original_module"}
    trained: dict[nn.Module, str] = {}
    originals: set[nn.Module] = set()
    for name, module in model.named_modules():
        base = next((attribute for kind, attribute in kept.items() if isinstance(module, kind)), None)
        if base is None:
            continue
        for child_name, child in module.named_children():
            if child_name == base:
                originals |= {child} if base in ("base_layer", "original_module") else set()
            else:
                trained |= dict.fromkeys(child.modules(), name)
    return {module: name for module, name in trained.items() if module not in originals}


def copied_modules(model: nn.Module) -> dict[nn.Module, str]:
    """The modules inside a model that ``modules_to_save`` trains copies of, with the name of the wrapper of both.

    The copies run instead of the originals, and replace them when adapters are merged.
    """
    if "peft" not in sys.modules:
        return {}
    from peft.utils.other import ModulesToSaveWrapper

    wrappers = [(name, m) for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    return {module: name for name, m in wrappers if len(m.modules_to_save) for module in m.original_module.modules()}


def unload_adapters(model: nn.Module) -> None:
    """Merge the active adapters into the layers of a model and remove PEFT's modules, in place.

    Like ``merge_and_unload``, for models without a ``PeftModel`` around them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, AuxiliaryTrainingWrapper):
                setattr(parent, name, child.unload_and_optionally_merge_module(True, False, None))
            elif isinstance(child, BaseTunerLayer):
                if child.active_adapters:
                    child.merge()
                setattr(parent, name, child.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    if getattr(model, "_hf_peft_config_loaded", False):  # the flag that transformers checks
        model._hf_peft_config_loaded = False  # type: ignore[assignment]
