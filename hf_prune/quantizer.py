"""Loads shrunk models and packed weights with plain ``from_pretrained``: transformers calls this before it reads them.

Our ``quantization_config`` says how many heads and neurons each layer has, and whether the weights are packed. The
loaded model is an ordinary one, with nothing left of its quantizer.

This module may be imported while transformers itself is being imported, so it imports modules that need transformers
inside its methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_prune.checkpoint.packed.quantizer import HfPruneConfig, PackedQuantizer, register, take_dense_tensors


class HfPruneQuantizer(PackedQuantizer):
    """Also resizes the modules of a model to the sizes in the checkpoint, and gives the model our methods."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        if self.quantization_config.compressed is not None and checkpoint_files is not None:
            from hf_prune.checkpoint.packed.files import PackedFiles
            from hf_prune.kernels.sparse.build import load_if_compiled

            PackedFiles(checkpoint_files, unsealed=True)  # raises before memory is allocated
            load_if_compiled()
        if self.quantization_config.structure:
            from hf_prune.structured.shrink import resize

            resize(model, self.quantization_config.structure)
        take_dense_tensors()
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from hf_prune.mixin import prunable

        # Saving the model again has to describe its sizes too.
        return prunable(super()._process_model_after_weight_loading(model, **kwargs))


register(HfPruneConfig, HfPruneQuantizer)
