"""Saving, loading and pushing as methods of pruned models: the masks go with the weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_prune.checkpoint.load import load_pruned
from hf_prune.checkpoint.save import refuse_adapters_alone, save_pruned
from hf_prune.conversion.compression import save_compressed
from hf_prune.errors import ConfigError
from hf_prune.hub.client import full_repo_id, is_downloaded
from hf_prune.hub.describe import describe_model
from hf_prune.hub.push import push_checkpoint
from hf_prune.hub.upload import PushResult
from hf_prune.pruning_methods import _PruningMethods, dense_class
from hf_prune.structured.shrink_record import is_shrunk
from hf_prune.utils.progress import working


class _SavingMixin(_PruningMethods):
    """The part of :class:`hf_prune.PrunedModelMixin` that reads and writes checkpoints."""

    @working("Saving")
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
        """Save as the dense class would, with the masks beside the weights; the folder is complete or unchanged.

        A compressed checkpoint is smaller and holds the masks in the weights. Plain ``from_pretrained`` loads it after
        ``import hf_prune``, and refuses it otherwise. If the model has adapters from ``add_adapter``, transformers
        saves only these, with a warning: call :func:`hf_prune.merge_lora` or ``delete_adapter`` first to save the rest.

        Args:
            save_directory: The folder.
            is_main_process: False on all but one process of a distributed run.
            state_dict: Weights to save instead of the model's; the masks are applied to them too.
            push_to_hub: Also upload the result, with a card, to ``repo_id`` or a repository named like the folder.
            compressed: Save packed weights, see ``docs/format.md``.
            codec: Of packed weights: ``"zstd"``, or ``"none"`` for values that are stored as they are.
            values: Of packed weights: ``"exact"``, or ``"int8"``, which rounds what pruning left and is lossy.
            remote_code: Of packed weights, and of shrunk models whose layers differ: add a file with which
                ``from_pretrained(…, trust_remote_code=True)`` loads them where hf_prune is not installed.
            overwrite: Also delete weights in the folder that another checkpoint left. Files of the same names are
                always replaced, and other variants of the weights are always kept.
            **kwargs: As of ``PreTrainedModel.save_pretrained``.

        Raises:
            CheckpointError: If ``save_directory`` is a file, or holds weights of another checkpoint that would be
                deleted; if a weight cannot be packed; if only adapters would be saved compressed, or uploaded; or if
                ``remote_code`` is set for a model whose class is not part of transformers.
            ConfigError: If ``codec`` or ``values`` is unknown, or ``remote_code`` is set for a checkpoint that any
                transformers loads.
        """
        if remote_code and not compressed and not is_shrunk(self):
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
            more: dict[str, Any] = {"overwrite": overwrite, "remote_code": remote_code, "state_dict": state_dict}
            save_pruned(self, native, save, save_directory, **more, **kwargs)
        else:
            save(self, save_directory, is_main_process=False, state_dict=state_dict, **kwargs)
        if push_to_hub and is_main_process:
            token = kwargs.get("token")
            repo_id = full_repo_id(hub.pop("repo_id", Path(save_directory).name), token)
            _write_card(self, Path(save_directory), repo_id)
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

        The card reports what is counted in the model, and what ``facts`` adds. Text of the repository's card outside
        our markers is kept. A model that was loaded from the Hub names its origin, and inherits that card's license.

        Args:
            repo_id: ``owner/name``, or a name for a repository of your own.
            compressed: Upload packed weights, see :meth:`save_pretrained`.
            tokenizer: A tokenizer or processor to upload with it.
            private: Make a new repository private.
            revision: A branch; None means ``main``.
            create_pr: Open a pull request.
            force: Also overwrite a repository that holds something else.
            commit_message: The message of the commit.
            token: A token for the Hub; None uses the one you are logged in with.
            facts: More for the card: ``base_model``, ``dataset``, ``license``, ``evaluation``, ``latency``, as of
                :class:`hf_prune.PruningCardData`.
            **kwargs: As of :meth:`save_pretrained`, such as ``max_shard_size`` or ``remote_code``.

        Raises:
            CheckpointError: If the model cannot be saved.
            HubError: If it cannot be uploaded; the repository is unchanged.
        """
        refuse_adapters_alone(self, "push_to_hub()")
        repo_id = full_repo_id(repo_id, token)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, compressed=compressed, **kwargs)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            _write_card(self, folder, repo_id, **(facts or {}))
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
        """Load a checkpoint, with its masks if it has some.

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
        """Whether the dense class is custom code, so that checkpoints are loaded as for that class."""
        return dense_class(cls).is_custom_code()


def _write_card(model: Any, folder: Path, repo_id: str, **facts: Any) -> None:
    """Write a model card into a folder; a model that came from the Hub names where from."""
    loaded = model.name_or_path
    if loaded != repo_id and is_downloaded(loaded):
        facts.setdefault("base_model", loaded)
    describe_model(model, folder, **{"name": repo_id, **facts})
