"""Layers that are switched off: they hand on the hidden states that they get, until ``shrink()`` takes them out.

Zero weights would not do that: where a norm follows the sum, as in BERT, a layer of zeros still changes what it gets.
A state dict cannot say what is switched off, so there is none until ``shrink()``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_prune.errors import CheckpointError


def bypass(layer: nn.Module) -> None:
    """Have a layer return its input; the mark stays with it in copies and pickles."""
    if not is_bypassed(layer):
        layer.register_forward_hook(_hand_on, with_kwargs=True)
        layer.register_state_dict_pre_hook(_refuse_state)


def is_bypassed(layer: nn.Module) -> bool:
    """Whether a layer is switched off."""
    return any(map(is_bypass, layer._forward_hooks.values()))


def is_bypass(hook: object) -> bool:
    """Whether a forward hook is the one that switches a layer off."""
    return hook is _hand_on


def restore(layer: nn.Module) -> None:
    """Have a layer do its work again."""
    for key, hook in list(layer._forward_hooks.items()):
        if hook is _hand_on:
            del layer._forward_hooks[key]
            layer._forward_hooks_with_kwargs.pop(key, None)
    for key, refusal in list(layer._state_dict_pre_hooks.items()):
        if refusal is _refuse_state:
            del layer._state_dict_pre_hooks[key]


def bypassed_layers(model: nn.Module) -> list[str]:
    """Names of the modules of a model that are switched off."""
    return [name for name, module in model.named_modules() if is_bypassed(module)]


def _refuse_state(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Of functions that take the state of a layer: without this one, a saved model would be another one, silently."""
    raise CheckpointError(
        f"{prefix.rstrip('.') or type(layer).__name__} is switched off, which a state dict cannot express: a model "
        f"with its weights would run it again; call hf_prune.shrink(model) first, which removes it"
    )


def _hand_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])
