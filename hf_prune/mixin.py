"""PrunedModelMixin: pruning as methods of any Hugging Face model. Everything is done elsewhere."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from hf_prune.calibration.batches import Batches
from hf_prune.checkpoint.load import load_pruned
from hf_prune.checkpoint.save import refuse_adapters_alone, save_pruned
from hf_prune.conversion.compression import save_compressed
from hf_prune.errors import ConfigError, ModelTypeError
from hf_prune.evaluation.sparsity_report import SparsityReport, sparsity_report
from hf_prune.hub.client import full_repo_id, is_downloaded
from hf_prune.hub.describe import describe_model
from hf_prune.hub.push import push_checkpoint
from hf_prune.hub.upload import PushResult
from hf_prune.pipeline import prune
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.plan import PruningPlan
from hf_prune.pruning.adopt_zeros import AdoptionReport, adopt_zeros
from hf_prune.pruning.mask_store import MaskStore, drop_masks
from hf_prune.pruning.optimizer_hook import keep_sparse
from hf_prune.structured.shrink import shrink_modules
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.utils.wrapping import check_is_model, sole_model, unload_adapters

Model = TypeVar("Model", bound=PreTrainedModel)
Self = TypeVar("Self", bound="PrunedModelMixin")


class PrunedModelMixin(nn.Module):
    """Adds pruning to a ``PreTrainedModel``.

    Three ways to the same methods: ``AutoPrunedModelFor….from_pretrained(id)``, ``prunable(model)`` for one that is
    loaded, or a class of one's own, with the mixin first.

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

        Some of its renamings go by the name of the class, which a class of one's own does not share.
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
            calibration: Batches, for what is learned from data; without them the plan leaves it open.
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
        """The settings of the last pruning, None without masks or where they came from elsewhere."""
        store = MaskStore.of(self)
        return store.config if store is not None else None

    def apply_masks(self: Self) -> Self:
        """Set every removed weight to zero again, after anything that wrote weights; return the model."""
        if (store := MaskStore.of(self)) is not None:
            store.apply(self)
        return self

    def adopt_zeros(self, **settings: Any) -> AdoptionReport:
        """Turn zeros that another tool left into masks; see :func:`hf_prune.adopt_zeros`."""
        return adopt_zeros(self, **settings)

    def keep_sparse(self, optimizer: Any) -> RemovableHandle:
        """Keep what is removed at zero after each step of an optimizer; see :func:`hf_prune.keep_sparse`."""
        return keep_sparse(self, optimizer)

    def make_permanent(self: Self) -> Self:
        """Drop the masks, leave the zeros, and return the model."""
        if (store := MaskStore.of(self)) is not None:
            store.make_permanent(self)
        return self

    def discard_masks(self: Self) -> Self:
        """Drop the masks, give the dense weights back bit for bit, and return the model.

        Raises:
            MaskError: If the model was pruned without ``keep_dense=True``.
        """
        if (store := MaskStore.of(self)) is not None:
            store.discard(self)
        return self

    def drop_masks(self: Self, *names: str) -> Self:
        """Drop the masks of some weights, as after one was replaced, and return the model.

        Raises:
            UnknownNameError: If one has no mask.
        """
        drop_masks(self, *names)
        return self

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As of ``PreTrainedModel``. Masks follow: tokens that stay keep theirs, and new ones are kept."""
        before = {name: parameter.shape for name, parameter in self.named_parameters()}
        resized = super().resize_token_embeddings(*args, **kwargs)  # type: ignore[misc]
        if (store := MaskStore.of(self)) is not None:
            store.follow_resize(self, before)
        return resized

    def delete_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As of ``PreTrainedModel``. Where the last adapter goes, the layers that held it are plain ones again."""
        super().delete_adapter(*args, **kwargs)  # type: ignore[misc]
        if not self._hf_peft_config_loaded:
            unload_adapters(self)

    def shrink(self: Self) -> Self:
        """Take out every head, neuron, channel and layer pruned as a whole; returns the model; see :func:`shrink`."""
        return shrink_modules(self)

    def sparsity_report(self, config: PruningConfig | None = None) -> SparsityReport:
        """Count what is zero; see :func:`hf_prune.sparsity_report`."""
        return sparsity_report(self, config)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        *,
        compressed: bool = False,
        codec: str = "zstd",
        values: str = "exact",
        remote_code: bool = False,
        overwrite: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as the dense class would, with the masks beside the weights; at once or not at all.

        A compressed checkpoint is smaller and has the masks in the weights. Plain ``from_pretrained`` loads it after
        ``import hf_prune``, and refuses it without. Of a model with adapters of ``add_adapter``, transformers saves
        these alone, and a warning says so: call :func:`hf_prune.merge_lora` or ``delete_adapter`` first to save it all.

        Args:
            save_directory: The folder.
            is_main_process: False on all but one process of a distributed run.
            state_dict: What to save in place of the model's own; the masks apply to it as well.
            push_to_hub: Upload the result as well, with a card, to ``repo_id`` or a repository named like the folder.
            compressed: Save packed weights, see ``docs/format.md``.
            codec: Of packed weights: ``"zstd"``, or ``"none"`` for values that lie in the file as they are.
            values: Of packed weights: ``"exact"``, or ``"int8"``, which rounds what pruning left and is lossy.
            remote_code: Of packed weights: put a file beside them by which ``from_pretrained(…,
                trust_remote_code=True)`` loads them where hf_prune is not installed.
            overwrite: Also delete weights that are in the way and were written by others, such as parts of another
                checkpoint. Files of the same names are replaced in any case, and those of other variants stay.
            **kwargs: As of ``PreTrainedModel.save_pretrained``.

        Raises:
            CheckpointError: If ``save_directory`` is a file, or has weights of others that would be deleted; if a
                weight cannot be packed; if adapters alone would be saved compressed, or uploaded; or if ``remote_code``
                is asked of a shrunk model or one that is not of transformers.
            ConfigError: If ``codec`` or ``values`` is unknown, or ``remote_code`` is asked of a dense checkpoint.
        """
        if remote_code and not compressed:
            raise ConfigError("remote_code=True without compressed=True: any transformers loads a dense checkpoint")
        if compressed or push_to_hub:
            refuse_adapters_alone(self, "compressed=True" if compressed else "push_to_hub=True")
        hub = {
            key: kwargs.pop(key)
            for key in ("repo_id", "commit_message", "private", "create_pr", "revision", "force")
            if key in kwargs
        }
        save = super().save_pretrained.__func__  # type: ignore[misc]
        native = dense_class(type(self))
        if is_main_process and compressed:
            save_compressed(
                lambda folder: save_pruned(self, native, save, folder, state_dict=state_dict, **kwargs),
                save_directory,
                codec=codec,
                values=values,
                max_shard_size=kwargs.get("max_shard_size"),
                remote_code=remote_code,
                overwrite=overwrite,
            )
        elif is_main_process:
            save_pruned(self, native, save, save_directory, overwrite=overwrite, state_dict=state_dict, **kwargs)
        else:
            save(self, save_directory, is_main_process=False, state_dict=state_dict, **kwargs)
        if push_to_hub and is_main_process:
            token = kwargs.get("token")
            repo_id = full_repo_id(hub.pop("repo_id", Path(save_directory).name), token)
            _describe(self, Path(save_directory), repo_id)
            push_checkpoint(save_directory, repo_id, token=token, model=self, **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        compressed: bool = False,
        tokenizer: Any = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        force: bool = False,
        commit_message: str = "Upload pruned model",
        token: str | bool | None = None,
        facts: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> PushResult:
        """Upload the model with its masks and a card, in one commit; see :func:`hf_prune.push_checkpoint`.

        The card says what was counted just now, and what ``facts`` adds. What the repository's card says outside of
        our marks stays. A model that was loaded from the Hub names where from, and takes over that card's license.

        Args:
            repo_id: ``owner/name``, or a name for a repository of your own.
            compressed: Upload packed weights, see :meth:`save_pretrained`.
            tokenizer: A tokenizer or processor to upload beside it.
            private: Make a new repository private.
            revision: A branch; None is ``main``.
            create_pr: Open a pull request.
            force: Also overwrite a repository that holds something else.
            commit_message: Of the commit.
            token: Of the Hub; None takes the one you are logged in with.
            facts: More for the card: ``base_model``, ``dataset``, ``license``, ``evaluation``, ``latency``, as of
                :class:`hf_prune.PruningCardData`.
            **kwargs: As of :meth:`save_pretrained`, such as ``max_shard_size`` or ``remote_code``.

        Raises:
            CheckpointError: If the model cannot be saved.
            HubError: If it cannot be uploaded; the repository is as it was.
        """
        refuse_adapters_alone(self, "push_to_hub()")
        repo_id = full_repo_id(repo_id, token)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, compressed=compressed, **kwargs)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            _describe(self, folder, repo_id, **(facts or {}))
            return push_checkpoint(
                folder,
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                force=force,
                commit_message=commit_message,
                token=token,
                model=self,
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint, and its masks where it has some.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            *args: As of ``PreTrainedModel.from_pretrained``.
            **kwargs: As of ``PreTrainedModel.from_pretrained``.

        Raises:
            CheckpointError: If the masks are damaged or do not fit the weights.
        """
        load = super().from_pretrained  # type: ignore[misc]
        return load_pruned(load, pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether the dense class is custom code: checkpoints are then loaded just as for that class."""
        return dense_class(cls).is_custom_code()


def prunable(model: Model) -> Model:
    """Give a loaded model the methods of :class:`PrunedModelMixin`, in place.

    The model's class becomes a subclass of the same name, so checkpoints, pickles, ``deepcopy`` and pipelines
    know it as what it was.

    Args:
        model: Any ``PreTrainedModel``.

    Returns:
        The same object.

    Raises:
        ModelTypeError: If it is no ``PreTrainedModel``; :func:`hf_prune.prune` takes any torch module.
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
    """Take out of a model, in place, every head, neuron, channel and layer pruned as a whole.

    Its tensors become smaller, its outputs stay the same. It gets the methods of :class:`PrunedModelMixin` as well, so
    that ``save_pretrained`` describes what its config alone does not tell. Of a part of a composite model that cannot
    reach the whole: call ``prunable(whole)`` first, else transformers saves the whole as something no class loads.

    Args:
        model: A ``PreTrainedModel`` of an architecture in the table, see ``hf_prune.register_architecture``; or a
            wrapper or holder of one.

    Returns:
        The same object; ``model.config.pruned_structure`` says what was taken out.

    Raises:
        ModelTypeError: If it is no ``PreTrainedModel``.
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
    """The subclass of a model class that has the mixin's methods; the class itself if it has them."""
    if issubclass(base, PrunedModelMixin):
        return base
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (PrunedModelMixin, base), {**names, "__reduce_ex__": _reduce_ex})


def dense_class(cls: type) -> Any:
    """The class that a pruned class is a pruned form of: the first in its order that lacks the mixin."""
    return next(c for c in cls.__mro__ if not issubclass(c, PrunedModelMixin))


def _reduce_ex(self: Any, protocol: object) -> tuple[Any, ...]:
    """Pickle by the dense class, which pickle can find by name."""
    return _rebuild, (dense_class(type(self)),), self.__dict__


def _rebuild(base: type) -> Any:
    cls: Any = pruned_class(base)
    return cls.__new__(cls)


def _describe(model: Any, folder: Path, repo_id: str, **facts: Any) -> None:
    """A card in the folder."""
    loaded = model.name_or_path
    if loaded != repo_id and is_downloaded(loaded):
        facts.setdefault("base_model", loaded)
    describe_model(model, folder, **{"name": repo_id, **facts})
