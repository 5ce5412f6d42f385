"""Keep what is removed at zero in any training loop."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_prune.errors import ConfigError, MaskError
from hf_prune.pruning.local_masks import LocalMasks
from hf_prune.pruning.mask_store import MaskStore


def keep_sparse(model: nn.Module, optimizer: Any) -> RemovableHandle:
    """Keep what is removed at zero in a training loop of your own: masks are applied after each step of the optimizer.

    They are those that the model has at that step, so it can be pruned further on the way. Optimizers of torch find
    weights with masks by themselves, and keep their zeros; this reaches what they do not find:

    - parameters that FSDP has replaced;
    - gradients that are set by hand: ``torch.autograd.grad``, then ``parameter.grad = …``;
    - a first step that computes its gradients by a closure, such as LBFGS's;
    - a copy or a pickle of a plain model, or one whose parameters were replaced, that never runs as a whole, with
      gradients and not compiled: a forward pass of the module that was pruned is what finds its new parameters.

    :func:`drop_masks` and ``make_permanent`` let zeros be trained.

    Args:
        model: A model with masks.
        optimizer: Any ``torch.optim.Optimizer`` of its parameters, also as ``accelerate`` wraps it.

    Returns:
        A handle, whose ``remove()`` takes the hook away again.

    Raises:
        MaskError: If the model has no masks.
        ConfigError: If it is no optimizer, or one of other parameters.

    Example:
        >>> import torch
        >>> from hf_prune import prune
        >>> model = prune(torch.nn.Linear(4, 4), 0.5)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> _ = keep_sparse(model, optimizer)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> int((model.weight == 0).sum())
        8
    """
    if (store := MaskStore.of(model)) is None:
        raise MaskError(
            f"this {type(model).__name__} has no masks, so there is nothing to keep at zero: prune it first, load it "
            f"with AutoPrunedModelFor…, or adopt its zeros with adopt_zeros()"
        )
    inner: Any = optimizer if hasattr(optimizer, "param_groups") else None  # a scheduler has an optimizer, and is none
    while not hasattr(inner, "_optimizer_step_post_hooks") and hasattr(inner, "optimizer"):
        inner = inner.optimizer  # accelerate's wrapper has no hooks of its own
    if not hasattr(inner, "_optimizer_step_post_hooks"):
        raise ConfigError(
            f"found a {type(optimizer).__name__}: expected a torch.optim.Optimizer; call apply_masks() after each step "
            f"of any other"
        )
    written = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
    if not any(id(p) in written for name, p in model.named_parameters() if name in store.masks):
        raise ConfigError(
            f"this {type(optimizer).__name__} holds none of the {len(store.masks)} weights with masks of this "
            f"{type(model).__name__}: expected the optimizer that trains them; if none does, as where adapters alone "
            f"are trained, their zeros stay without it"
        )
    masks = LocalMasks(model)
    return inner.register_step_post_hook(lambda *_: masks.apply())
