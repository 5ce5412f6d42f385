"""Saving and loading as methods of pruned models of sentence-transformers: the masks go with the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_prune.checkpoint.files import MASK_FILE, find_file
from hf_prune.checkpoint.load import attach_saved_masks
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.conversion.compression import save_compressed
from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.pruning_methods import _PruningMethods
from hf_prune.utils.files import read_text
from hf_prune.utils.wrapping import outermost_models


class _SentenceSavingMixin(_PruningMethods):
    """The part of :class:`hf_prune.mixin.PrunedSentenceModelMixin` that reads and writes folders."""

    def save(
        self,
        path: str | os.PathLike[str],
        *args: Any,
        compressed: bool = False,
        codec: str = "zstd",
        values: str = "exact",
        overwrite: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save as the dense class would, with the masks beside the weights; the folder is complete or unchanged.

        Plain ``SentenceTransformer(path)`` or ``CrossEncoder(path)`` loads the result, after ``import hf_prune`` if it
        is compressed or its layers differ in size.

        Args:
            path: The folder.
            *args: As of ``save`` of the dense class.
            compressed: Save packed weights, see :meth:`hf_prune.PrunedModelMixin.save_pretrained`.
            codec: Of packed weights, as there.
            values: Of packed weights, as there.
            overwrite: Also delete weights in the folder that another checkpoint left.
            **kwargs: As of ``save`` of the dense class.

        Raises:
            CheckpointError: If ``path`` is a file, or holds weights of another checkpoint that would be deleted; or if
                a weight cannot be packed.
            ConfigError: If ``codec`` or ``values`` is unknown, or ``compressed`` is set for several models in one.
        """
        save = super().save  # type: ignore[misc]
        if not compressed:
            with staged_checkpoint(path, overwrite=overwrite) as staging:
                save(str(staging), *args, **kwargs)
            return
        if len(parts := outermost_models(self)) != 1:
            raise ConfigError(
                f"compressed=True is for one transformers model, and this {type(self).__name__} holds {len(parts)}: "
                f"leave it out"
            )

        def save_dense(folder: Path) -> None:
            save(str(folder), *args, **kwargs)

        save_compressed(save_dense, path, codec=codec, values=values, overwrite=overwrite)

    def save_pretrained(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """The same as :meth:`save`."""
        self.save(path, *args, **kwargs)

    def _attach_saved_masks(
        self,
        model_name_or_path: str | None = None,
        *_: Any,
        cache_folder: str | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        **__: Any,
    ) -> None:
        """Attach the masks of the checkpoint that the arguments of the dense class name, if it has some."""
        parts = outermost_models(self)
        if model_name_or_path is None or not parts:
            return
        source = str(model_name_or_path) if os.path.isdir(model_name_or_path) else str(parts[0].name_or_path)
        cache = cache_folder or os.environ.get("SENTENCE_TRANSFORMERS_HOME")
        hub = {"cache_dir": cache, "local_files_only": local_files_only, "revision": revision, "token": token}
        hub = {key: value for key, value in hub.items() if value is not None}
        for name, part in self.named_children():
            if models := outermost_models(part):
                folder = _folder_of(source, name, hub)
                if len(models) > 1:  # a Router keeps each of its models in a folder of its own
                    _refuse_masks_of_several(source, folder)
                    continue
                attach_saved_masks(models[0], source, hub | ({"subfolder": folder} if folder else {}))


def _folder_of(source: str, name: str, hub: Mapping[str, Any]) -> str:
    """The folder of a module of sentence-transformers inside a checkpoint; empty for the checkpoint itself."""
    path = find_file(source, "modules.json", hub)
    if path is None:  # a checkpoint of transformers
        return ""
    modules = json.loads(read_text(Path(path)))  # the library has read it before
    return next((str(module["path"]) for module in modules if str(module["name"]) == name), "")


def _refuse_masks_of_several(source: str, folder: str) -> None:
    if found := sorted(Path(source, folder).rglob(MASK_FILE)) if os.path.isdir(source) else []:
        raise CheckpointError(
            f"{found[0]} holds the masks of one of several models in {source}: load it without its masks, with the "
            f"class of sentence-transformers, or load each of the models alone"
        )
