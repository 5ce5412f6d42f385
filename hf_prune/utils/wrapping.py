"""What lies around a model and inside it without being the model: wrappers, and PEFT's adapters."""

from __future__ import annotations

import os
import re
import reprlib
import sys
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_prune.errors import ModelTypeError

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")  # what others put into names
_ADAPTED = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")  # what PEFT does


def check_is_model(model: object) -> None:
    """Make sure that a model was passed, and not its name, config or pipeline.

    Raises:
        ModelTypeError: If it is no torch module.
    """
    if isinstance(model, nn.Module):
        return
    found = f"found {reprlib.repr(model)}, of type {type(model).__name__}"
    if isinstance(model, str | os.PathLike):
        hint = f"load it first, with hf_prune.AutoPrunedModelFor….from_pretrained({reprlib.repr(os.fspath(model))})"
    elif isinstance(getattr(model, "model", None), nn.Module):  # a pipeline, or a trainer
        found, hint = f"found a {type(model).__name__}", "pass the model that it holds, its .model"
    elif hasattr(model, "model_type"):
        found, hint = f"found a {type(model).__name__}", "make a model of it, or load one with from_pretrained"
    else:
        hint = "load one with hf_prune.AutoPrunedModelFor….from_pretrained"
    raise ModelTypeError(f"{found}: expected a model, that is a torch.nn.Module; {hint}")


def without_wrappers(model: nn.Module) -> nn.Module:
    """The model inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``.

    Raises:
        ModelTypeError: If it is no model.
    """
    check_is_model(model)
    while True:
        if isinstance(model, nn.DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(inner := model._modules.get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers, and inside a ``PeftModel``: whatever is done to it is done to those as well."""
    inner: Any = without_wrappers(model)
    while callable(getattr(type(inner), "get_base_model", None)):
        inner = without_wrappers(inner.get_base_model())
    return inner


def sole_model(module: nn.Module) -> nn.Module:
    """The one transformers model inside a module that is none itself, such as a holder; else what it is."""
    from transformers import PreTrainedModel

    model = unwrapped(module)
    if isinstance(model, PreTrainedModel):
        return model
    found = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    inside = {id(part) for outer in found for part in list(outer.modules())[1:]}
    outermost = [part for part in found if id(part) not in inside]
    return outermost[0] if len(outermost) == 1 else model


def plain_name(name: str) -> str:
    """The name of a parameter without what wrappers inside a model add to it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def unadapted_name(name: str) -> str:
    """The name that a module or parameter has without adapters, and once they are merged."""
    return _ADAPTED.sub("", name)


def adapters(model: nn.Module) -> dict[nn.Module, str]:
    """The modules inside a model that are PEFT's and hold what it trains, with the name of the layer they belong to.

    Besides LoRA's matrices and their kin these are the copies that ``modules_to_save`` makes; what they adapt or are
    copies of belongs to the model.
    """
    if "peft" not in sys.modules:
        return {}
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kept = {PeftModel: "base_model", BaseTuner: "model", BaseTunerLayer: "base_layer"}
    kept |= {AuxiliaryTrainingWrapper: "original_module"}
    found: dict[nn.Module, str] = {}
    own: set[nn.Module] = set()
    for name, module in model.named_modules():
        base = next((attribute for kind, attribute in kept.items() if isinstance(module, kind)), None)
        if base is None:
            continue
        for child_name, child in module.named_children():
            if child_name == base:
                own |= {child} if base in ("base_layer", "original_module") else set()
            else:
                found |= dict.fromkeys(child.modules(), name)
    return {module: name for module, name in found.items() if module not in own}


def copied_modules(model: nn.Module) -> dict[nn.Module, str]:
    """The modules inside a model of which ``modules_to_save`` trains copies, with the name of what holds both.

    The copies run in their place, and take it when adapters are merged.
    """
    if "peft" not in sys.modules:
        return {}
    from peft.utils.other import ModulesToSaveWrapper

    wrappers = [(name, m) for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    return {module: name for name, m in wrappers if len(m.modules_to_save) for module in m.original_module.modules()}


def unload_adapters(model: nn.Module) -> None:
    """Merge what adapters are active into the layers inside a model, and put these in the place of PEFT's, in place.

    That is what ``merge_and_unload`` does, for models without a ``PeftModel`` around them.
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
    if getattr(model, "_hf_peft_config_loaded", False):  # what transformers goes by
        model._hf_peft_config_loaded = False  # type: ignore[assignment]
