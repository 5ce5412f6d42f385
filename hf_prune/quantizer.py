"""Loads shrunk models and packed weights by plain ``from_pretrained``: transformers calls this before it reads them.

Our ``quantization_config`` says how many heads and neurons each layer has, and whether the weights are packed; the
model that comes out is an ordinary one, of which nothing else knows.

transformers imports this module while it is being imported itself, at times on behalf of another module of ours: what
imports transformers is therefore imported when it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_prune.checkpoint.packed.quantizer import HfPruneConfig, PackedQuantizer, register, take_dense_tensors


class HfPruneQuantizer(PackedQuantizer):
    """Also gives the modules of a model the sizes of the checkpoint, and the model our methods."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        if self.quantization_config.compressed is not None and checkpoint_files is not None:
            from hf_prune.checkpoint.packed.files import PackedFiles

            PackedFiles(checkpoint_files)  # or an error, before memory is allocated
        if self.quantization_config.structure:
            from hf_prune.structured.shrink import resize

            resize(model, self.quantization_config.structure)
        take_dense_tensors()
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from hf_prune.mixin import prunable

        # saving it again has to describe its sizes as well
        return prunable(super()._process_model_after_weight_loading(model, **kwargs))


register(HfPruneConfig, HfPruneQuantizer)
