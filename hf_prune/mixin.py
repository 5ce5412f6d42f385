"""PrunedModelMixin: pruning as methods of any Hugging Face model. The work is done in the packages before this one."""

from __future__ import annotations

import functools
from typing import Any, TypeVar, overload

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from hf_prune.errors import ModelTypeError
from hf_prune.pruning.mask_store import MaskStore
from hf_prune.pruning_methods import _PruningMethods, dense_class
from hf_prune.saving_mixin import _SavingMixin
from hf_prune.sentence_mixin import _SentenceSavingMixin
from hf_prune.structured.shrink import shrink_modules
from hf_prune.utils.wrapping import check_is_model, is_sentence_class, outermost_models, sole_model, unload_adapters

Model = TypeVar("Model", bound=nn.Module)
Self = TypeVar("Self", bound="_PruningMethods")
_EXPECTED = "expected a transformers PreTrainedModel"


class PrunedModelMixin(_SavingMixin):
    """Adds pruning to a ``PreTrainedModel``.

    There are three ways to get these methods: ``AutoPrunedModelFor….from_pretrained(id)``, ``prunable(model)`` for a
    loaded model, or a class of your own that lists the mixin first.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> class PrunedBert(PrunedModelMixin, BertForSequenceClassification):
        ...     pass
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> round(PrunedBert(config).prune(0.5).sparsity_report().target_sparsity, 3)
        0.5
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have transformers rename the weights of old checkpoints as it does for the dense class.

        Some of its renamings depend on the name of the class, which a user's class does not share.
        """
        super().__init_subclass__(**kwargs)
        conversions = get_checkpoint_conversion_mapping(dense_class(cls).__name__)
        if conversions is not None and cls.__name__ != dense_class(cls).__name__:
            register_checkpoint_conversion_mapping(cls.__name__, conversions, overwrite=True)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As of ``PreTrainedModel``. Masks are resized too: present tokens keep theirs, new ones are not pruned."""
        before = {name: parameter.shape for name, parameter in self.named_parameters()}
        resized = super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]
        if (store := MaskStore.of(self)) is not None:
            store.follow_resize(self, before)
        return resized

    def delete_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As of ``PreTrainedModel``. Without its last adapter, a layer that held adapters becomes a plain one again."""
        super().delete_adapter(*args, **kwargs)  # type: ignore[misc]
        if not self._hf_peft_config_loaded:
            unload_adapters(self)


class PrunedSentenceModelMixin(_SentenceSavingMixin):
    """Adds pruning to models of sentence-transformers; see :func:`prunable`.

    The transformers model inside is pruned, and has the methods of :class:`PrunedModelMixin` itself; pooling and what
    else comes after it stay as they are. Several of them, as in a ``Router``, are pruned as a whole, with all else that
    multiplies. Texts are calibration data, see :func:`hf_prune.sentence_batches`.

    Example:
        >>> model = prunable(SentenceTransformer)("pruned")  # with its masks  # doctest: +SKIP
        >>> model.prune(0.6, criterion="wanda", calibration=texts).save_pretrained("sparser")  # doctest: +SKIP
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if outermost_models(self):
            prunable(self)
        self._attach_saved_masks(*args, **kwargs)

    def shrink(self: Self) -> Self:
        """Remove every head, neuron and layer pruned as a whole, and return the model; see :func:`shrink`."""
        for part in outermost_models(self):
            shrink_modules(part)
        return self


@overload
def prunable(model: type[Model]) -> type[Model]: ...


@overload
def prunable(model: Model) -> Model: ...


def prunable(model: Any) -> Any:
    """Give a loaded model the methods of :class:`PrunedModelMixin`, in place.

    The model's class becomes a subclass of the same name, so checkpoints, pickles, ``deepcopy`` and pipelines treat it
    as before. That subclass is what a class gives: ``prunable(SentenceTransformer)("pruned")`` loads a checkpoint with
    its masks.

    Args:
        model: Any ``PreTrainedModel``, or a model of sentence-transformers, such as ``SentenceTransformer`` or
            ``CrossEncoder``; what ``torch.compile`` made of one; or the class of one.

    Returns:
        The same object; of a class the subclass.

    Raises:
        ModelTypeError: If it is neither; :func:`hf_prune.prune` takes any torch module.
    """
    if isinstance(model, type):
        if issubclass(model, PreTrainedModel) or is_sentence_class(model):
            return pruned_class(model)
        raise ModelTypeError(f"found the class {model.__name__}: {_EXPECTED}, or its class")
    check_is_model(model)
    if isinstance(compiled := model._modules.get("_orig_mod"), nn.Module):  # the wrapper has what the model has
        prunable(compiled)
        return model
    parts = outermost_models(model) if is_sentence_class(type(model)) else [model]
    if not parts or not all(isinstance(part, PreTrainedModel) for part in parts):
        raise ModelTypeError(
            f"found a {type(model).__name__}{'' if parts else ' without a transformers model'}: {_EXPECTED}; unwrap "
            f"it, or pass what is inside, one model at a time; hf_prune.prune(model) takes any torch module"
        )
    for part in (*parts, model):
        part.__class__ = pruned_class(type(part))  # type: ignore[arg-type]
    return model


def shrink(model: Model) -> Model:
    """Remove from a model, in place, every head, neuron, channel and layer pruned as a whole.

    Its tensors become smaller, its outputs stay the same. It also gets the methods of :class:`PrunedModelMixin`, so
    that ``save_pretrained`` describes the sizes that its config alone does not tell. To shrink a part of a composite
    model, call ``prunable(whole)`` first; otherwise transformers saves the whole as a checkpoint that no class loads.

    Args:
        model: A ``PreTrainedModel`` of an architecture in the table, see ``hf_prune.register_architecture``; or a
            wrapper or holder of one.

    Returns:
        The same object; ``model.config.pruned_structure`` says what was removed.

    Raises:
        ModelTypeError: If it is not a ``PreTrainedModel``.
        ArchitectureError: If its architecture is not registered, or a module cannot be resized.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        >>> model = BertForSequenceClassification(config)
        >>> _ = model.bert.encoder.layer[0].output.dense.weight.data[:, :4].zero_()  # nothing reads four neurons
        >>> shrink(model).config.intermediate_size
        12
    """
    shrink_modules(prunable(sole_model(model)))
    return model


@functools.cache
def pruned_class(base: type) -> type:
    """The subclass of a model class that has the mixin's methods; the class itself if it has them already."""
    if issubclass(base, _PruningMethods):
        return base
    mixin = PrunedSentenceModelMixin if is_sentence_class(base) else PrunedModelMixin
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (mixin, base), {**names, "__reduce_ex__": _reduce_ex})


def _reduce_ex(self: Any, protocol: object) -> tuple[Any, ...]:
    """Pickle by the dense class, which pickle can find by name."""
    return _rebuild, (dense_class(type(self)),), self.__dict__


def _rebuild(base: type) -> Any:
    """Unpickle; pickles contain this function's name and module, so neither may change."""
    cls: Any = pruned_class(base)
    return cls.__new__(cls)
