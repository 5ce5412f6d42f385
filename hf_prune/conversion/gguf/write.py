"""Write a model as one GGUF file, and compare what llama.cpp computes from it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_prune.conversion.gguf.compare import Comparison, can_compare, compare
from hf_prune.conversion.gguf.layout import BLOCK, Layout, context_length, read_layout, rope_settings
from hf_prune.conversion.gguf.tensors import as_written, named_tensors
from hf_prune.conversion.gguf.vocabulary import Vocabulary, read_vocabulary
from hf_prune.errors import ExportError
from hf_prune.inference.backends import need
from hf_prune.pruning.mask_store import warn_regrown
from hf_prune.utils.files import sync
from hf_prune.utils.number_formats import refuse_quantized
from hf_prune.utils.offloaded_weights import refuse_offloaded
from hf_prune.utils.output_folder import check_file, warn_replaced
from hf_prune.utils.progress import working
from hf_prune.utils.results import Result

GGUF_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # and what ``general.file_type`` calls them
_LARGEST_F16 = 65504.0


@dataclass(frozen=True, repr=False)
class GGUFReport(Result):
    """The GGUF file that an export wrote, and how close llama.cpp comes to PyTorch with it. Print it.

    Args:
        path: The file.
        architecture: What llama.cpp takes the model for.
        dtype: How matrices are stored; vectors are in float32.
        size: Bytes.
        added_neurons: Neurons that are zero and were added, since llama.cpp needs them.
        not_quantized: Matrices that stay in float16, because their rows are no whole number of blocks of 32.
        difference: Largest difference of a log-probability from PyTorch's along a greedy continuation; None if
            ``xllamacpp`` is not installed, so that nothing was compared.
        same_text: Whether PyTorch continues with the same tokens.
        tokens: How many tokens were compared.
    """

    bars = ("difference",)

    path: Path
    architecture: str
    dtype: str
    size: int
    added_neurons: int
    not_quantized: int
    difference: float | None = None
    same_text: bool | None = None
    tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**vars(self), "path": str(self.path)}

    def __str__(self) -> str:
        text = f"Saved {self.path} ({self.size / 1e6:,.1f} MB, {self.dtype}), a {self.architecture!r} of llama.cpp"
        if self.added_neurons:
            text += f", with {self.added_neurons:,} neurons more that are all zero"
        if self.not_quantized:
            text += f"; {self.not_quantized} matrices have rows that are not multiples of {BLOCK} and stay in f16"
        if self.difference is None:
            return f"{text}. It was not compared with PyTorch: pip install xllamacpp."
        same = "the same" if self.same_text else "other"
        return (
            f"{text}; there, log-probabilities of {self.tokens} tokens differ from PyTorch's by {self.difference:.1e} "
            f"at most, and PyTorch continues with {same} tokens."
        )


@working("Exporting")
def export_gguf(
    model: Any, tokenizer: Any, path: str | Path, *, dtype: str = "f16", overwrite: bool = False
) -> GGUFReport:
    """Write a causal language model, masked or shrunk, as a GGUF file for llama.cpp.

    Llama, Mistral, Qwen2 and Qwen3 whose layers are alike become their own architecture. Layers with different numbers
    of heads or neurons, or without attention or FFN, become ``deci``, which llama.cpp reads sizes per layer for; that
    fits all but Qwen3. A masked model keeps its zeros. Before the file is put in place, llama.cpp reads it, if
    ``xllamacpp`` is installed, and continues a text; PyTorch's log-probabilities have to agree.

    Args:
        model: A ``LlamaForCausalLM`` (SmolLM is one), ``MistralForCausalLM``, ``Qwen2ForCausalLM`` or
            ``Qwen3ForCausalLM``.
        tokenizer: Its fast tokenizer.
        path: The file, ending in ``.gguf``.
        dtype: How matrices are stored: ``"f32"``, ``"f16"``, ``"bf16"`` or ``"q8_0"``, int8 with a scale for every 32
            values. For ``"q8_0"``, FFNs are filled up with zero neurons to a multiple of 32.
        overwrite: Replace an existing file.

    Returns:
        What was written, and how close it is.

    Raises:
        CheckpointError: If the file exists already.
        ExportError: If a package is missing, llama.cpp has no architecture or tokenizer like this one, or computes
            something else.
        PlanError: If weights are offloaded or quantized.

    Example:
        >>> export_gguf(model, tokenizer, "model.gguf", dtype="q8_0")  # doctest: +SKIP
    """
    path = Path(path)
    refuse_quantized(model)
    if path.suffix != ".gguf":
        raise ExportError(f"{path} ends in {path.suffix!r}: expected .gguf")
    if dtype not in GGUF_TYPES:
        raise ExportError(f"found the type {dtype!r}: expected one of {', '.join(GGUF_TYPES)}")
    check_file(path, overwrite=overwrite)
    need("gguf", extra="gguf")
    layout = read_layout(model, whole_blocks=dtype == "q8_0")
    rope = rope_settings(model, layout)
    vocabulary = read_vocabulary(tokenizer, model.model.embed_tokens.weight.shape[0])
    refuse_offloaded(model, "export_gguf()")
    warn_regrown(model, "the exported model is not the one that save_pretrained() writes, in which they are zero")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as name:
        written = Path(name) / path.name
        not_quantized = _write(written, model, layout, rope, vocabulary, dtype)
        compared = compare(written, model, tokenizer, dtype) if can_compare() else Comparison(None, None, 0)
        sync(written)
        warn_replaced(path.parent, [path.name])
        written.replace(path)
    added = sum(layer.added for layer in layout.layers)
    size = path.stat().st_size
    return GGUFReport(path, layout.architecture, dtype, size, added, not_quantized, *vars(compared).values())


def _write(path: Path, model: Any, layout: Layout, rope: dict[str, Any], vocabulary: Vocabulary, dtype: str) -> int:
    """Write the file, one tensor at a time; returns how many matrices could not be quantized."""
    import gguf

    writer: Any = gguf.GGUFWriter(path, layout.architecture)
    _add_sizes(writer, model, layout, rope)
    writer.add_file_type(GGUF_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_vocabulary(writer, vocabulary)
    kinds: dict[str, str] = {}
    tensors = named_tensors(model, layout)
    if (frequencies := rope.get("frequencies")) is not None:
        writer.add_tensor_info("rope_freqs.weight", frequencies.shape, frequencies.dtype, frequencies.nbytes)
    for name, (weight, size) in tensors.items():
        shape = tuple(as_written(name, weight.to("meta"), size, layout).shape)
        kinds[name] = kind = _kind(shape, dtype)
        number_format = gguf.GGMLQuantizationType[kind.upper()]
        bytes_shape = gguf.quants.quant_shape_to_byte_shape(shape, number_format)
        count = bytes_shape[0] * (bytes_shape[1] if len(bytes_shape) > 1 else 1)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count, number_format)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if frequencies is not None:
            writer.write_tensor_data(frequencies)
        for name, (weight, size) in tensors.items():
            values = as_written(name, weight, size, layout).to("cpu", torch.float32).contiguous()
            if kinds[name] == "f16":
                _check_range(name, values)
            number_format = gguf.GGMLQuantizationType[kinds[name].upper()]
            writer.write_tensor_data(gguf.quants.quantize(values.numpy(), number_format))
    finally:
        writer.close()
    return sum(kind == "f16" for kind in kinds.values()) if dtype == "q8_0" else 0


def _kind(shape: tuple[int, ...], dtype: str) -> str:
    """How a tensor of some shape is stored."""
    if len(shape) == 1:
        return "f32"
    return "f16" if dtype == "q8_0" and shape[1] % BLOCK else dtype


def _check_range(name: str, values: Tensor) -> None:
    if values.numel() and not (largest := float(values.abs().max())) <= _LARGEST_F16:
        raise ExportError(f"GGUF: {name} has a weight of {largest:.3g}, beyond float16: choose bf16 or f32")


def _add_sizes(writer: Any, model: Any, layout: Layout, rope: dict[str, Any]) -> None:
    import gguf

    config = model.config
    writer.add_name(Path(str(getattr(config, "_name_or_path", ""))).name or type(model).__name__)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layout.layers))
    writer.add_head_count(layout.per_layer("heads"))
    writer.add_head_count_kv(layout.per_layer("kv_heads"))
    writer.add_feed_forward_length(layout.per_layer("neurons"))
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(model.model.embed_tokens.weight.shape[0])
    writer.add_rope_dimension_count(layout.head_dim)
    writer.add_rope_freq_base(rope["base"])
    if (kind := rope.get("type")) is None:
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    for name, value in vocabulary.flags.items():
        getattr(writer, f"add_{name}")(value)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
