"""PrunedModelMixin: pruning as methods of any Hugging Face model. The work is done in the packages before this one."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from hf_prune.calibration.batches import Batches
from hf_prune.errors import ModelTypeError
from hf_prune.evaluation.sparsity_report import SparsityReport, sparsity_report
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.plan import PruningPlan
from hf_prune.pruning.adopt_zeros import AdoptionReport, adopt_zeros
from hf_prune.pruning.mask_store import MaskStore, drop_masks
from hf_prune.pruning.optimizer_hook import keep_sparse
from hf_prune.saving_mixin import _SavingMixin, dense_class
from hf_prune.structured.shrink import shrink_modules
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.utils.wrapping import check_is_model, sole_model, unload_adapters

Model = TypeVar("Model", bound=PreTrainedModel)
Self = TypeVar("Self", bound="PrunedModelMixin")


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

    def plan(
        self,
        config: PruningConfig | float | None = None,
        *,
        calibration: Batches | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> PruningPlan | UnitPlan:
        """What :meth:`prune` would do with these settings; nothing is changed.

        Args:
            config: The settings, or just the sparsity.
            calibration: Batches, for choices that are learned from data; without them the plan leaves these open.
            progress: Show a progress bar while calibrating.
            **settings: Fields of :class:`PruningConfig`.

        Raises:
            ConfigError: If a setting is invalid.
            PlanError: If the settings do not fit the model.
            CalibrationError: If the batches are unusable.
        """
        return prune(self, config, calibration=calibration, dry_run=True, progress=progress, **settings)

    def prune(
        self: Self,
        config: PruningConfig | float | None = None,
        *,
        calibration: Batches | None = None,
        polish_data: Batches | None = None,
        keep_dense: bool = False,
        progress: bool = False,
        **settings: Any,
    ) -> Self:
        """Prune the model in place and return it; see :func:`hf_prune.prune`."""
        return prune(
            self,
            config,
            calibration=calibration,
            polish_data=polish_data,
            keep_dense=keep_dense,
            dry_run=False,
            progress=progress,
            **settings,
        )

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Masks by parameter name, True = keep; empty before pruning and after :meth:`make_permanent`."""
        store = MaskStore.of(self)
        return store.view() if store is not None else MappingProxyType({})

    @property
    def pruning_config(self) -> PruningConfig | None:
        """The settings of the last pruning; None without masks, or if the masks came from elsewhere."""
        store = MaskStore.of(self)
        return store.config if store is not None else None

    def apply_masks(self: Self) -> Self:
        """Set every removed weight to zero again, after something wrote to the weights, and return the model."""
        if (store := MaskStore.of(self)) is not None:
            store.apply(self)
        return self

    def adopt_zeros(self, **settings: Any) -> AdoptionReport:
        """Turn zeros that another tool left into masks; see :func:`hf_prune.adopt_zeros`."""
        return adopt_zeros(self, **settings)

    def keep_sparse(self, optimizer: Any) -> RemovableHandle:
        """Keep removed weights at zero after each step of an optimizer; see :func:`hf_prune.keep_sparse`."""
        return keep_sparse(self, optimizer)

    def make_permanent(self: Self) -> Self:
        """Drop the masks, leave the zeros, and return the model."""
        if (store := MaskStore.of(self)) is not None:
            store.make_permanent(self)
        return self

    def discard_masks(self: Self) -> Self:
        """Drop the masks, restore the dense weights bit for bit, and return the model.

        Raises:
            MaskError: If the model was pruned without ``keep_dense=True``.
        """
        if (store := MaskStore.of(self)) is not None:
            store.discard(self)
        return self

    def drop_masks(self: Self, *names: str) -> Self:
        """Drop the masks of some weights, for example after one was replaced, and return the model.

        Raises:
            UnknownNameError: If a name has no mask.
        """
        drop_masks(self, *names)
        return self

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

    def shrink(self: Self) -> Self:
        """Remove every head, neuron, channel and layer pruned as a whole, and return the model; see :func:`shrink`."""
        return shrink_modules(self)

    def sparsity_report(self, config: PruningConfig | None = None) -> SparsityReport:
        """Count what is zero; see :func:`hf_prune.sparsity_report`."""
        return sparsity_report(self, config)


def prunable(model: Model) -> Model:
    """Give a loaded model the methods of :class:`PrunedModelMixin`, in place.

    The model's class becomes a subclass of the same name, so checkpoints, pickles, ``deepcopy`` and pipelines treat it
    as before.

    Args:
        model: Any ``PreTrainedModel``.

    Returns:
        The same object.

    Raises:
        ModelTypeError: If it is not a ``PreTrainedModel``; :func:`hf_prune.prune` takes any torch module.
    """
    check_is_model(model)
    if not isinstance(model, PreTrainedModel):
        raise ModelTypeError(
            f"found a {type(model).__name__}: expected a transformers PreTrainedModel; unwrap it, or pass what is "
            f"inside, one model at a time; hf_prune.prune(model) takes any torch module"
        )
    model.__class__ = pruned_class(type(model))  # type: ignore[arg-type]
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
    shrink_modules(prunable(sole_model(model)))  # type: ignore[type-var]
    return model


@functools.cache
def pruned_class(base: type) -> type:
    """The subclass of a model class that has the mixin's methods; the class itself if it has them already."""
    if issubclass(base, PrunedModelMixin):
        return base
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (PrunedModelMixin, base), {**names, "__reduce_ex__": _reduce_ex})


def _reduce_ex(self: Any, protocol: object) -> tuple[Any, ...]:
    """Pickle by the dense class, which pickle can find by name."""
    return _rebuild, (dense_class(type(self)),), self.__dict__


def _rebuild(base: type) -> Any:
    """Unpickle; pickles contain this function's name and module, so neither may change."""
    cls: Any = pruned_class(base)
    return cls.__new__(cls)
