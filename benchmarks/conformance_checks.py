"""What :mod:`benchmarks.conformance` checks on one model type, on a small model built from its config class alone."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import hf_prune
from benchmarks.conformance import CHECKS
from hf_prune.architectures.small_models import example_inputs, small_model
from hf_prune.errors import HfPruneError
from hf_prune.planning.coverage import left_dense, passed_over
from hf_prune.planning.prunable import output_embeddings
from hf_prune.planning.targets import resolve_targets
from hf_prune.utils.forward import tensors_in

UNITS = ("head", "neuron", "layer", "expert")
_CLOSE = 1e-4  # of outputs, in units of their largest value

# Settings without which the default config of a type builds no model, or none that runs; its checkpoints have them.
_BACKBONE = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
_BACKBONE |= {"backbone_config": {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]}}
_ROTARY = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}
_SERIES = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2, 3]}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "autoformer": _SERIES,
    "bamba": {"attn_layer_indices": [1]},
    "conditional_detr": _BACKBONE,
    "dab-detr": _BACKBONE,
    "deformable_detr": _BACKBONE,
    "detr": _BACKBONE,
    "table-transformer": _BACKBONE,
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "chameleon": {"vocabulary_map": {"<image>": 3}},
    "cohere_compass": {"text_config": {"rope_parameters": _ROTARY}},
    "cohere_compass_text": {"rope_parameters": _ROTARY},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"]}},
    "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 256}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]]},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "blip-2": {"image_token_index": 50265},
    "emu3": {"vocabulary_map": {"<|extra_200|>": 5, "<image>": 6}},
    "instructblip": {"image_token_index": 50265},
    "instructblipvideo": {"video_token_index": 50265},
    "reformer": {"axial_pos_shape": [4, 4]},
    "step3p7": {"text_config": {"sliding_window": 512}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "hunyuan_vl": {"text_config": {"head_dim": 128}},
    "hunyuan_vl_text": {"head_dim": 128},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "informer": _SERIES,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 151652},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 151652},
    "time_series_transformer": _SERIES,
    "xmod": {"default_language": "en_XX"},
}
# The class of types whose base class takes another config than theirs.
CLASSES = {"musicgen": "MusicgenForConditionalGeneration", "musicgen_melody": "MusicgenMelodyForConditionalGeneration"}


def build(model_type: str) -> tuple[Any, dict[str, Any]]:
    """A small model of a type, and inputs for it.

    Args:
        model_type: A type that ``AutoModel`` knows.
    """
    config = transformers.CONFIG_MAPPING[model_type](**SETTINGS.get(model_type, {}))
    if model_type in CLASSES:
        model = small_model(getattr(transformers, CLASSES[model_type]), config)
    else:
        named = transformers.MODEL_MAPPING[type(config)]
        model = small_model(named[0] if isinstance(named, tuple) else named, config)
    return model, example_inputs(model)


def measure(model_type: str, checks: Sequence[str] = CHECKS) -> Iterator[dict[str, Any]]:
    """What is covered in a model type, and how each check went; to be called in a process of its own.

    Args:
        model_type: A type that ``AutoModel`` knows.
        checks: Some of ``conformance.CHECKS``.

    Yields:
        Plain values for JSON, once the model is built and again after each check, so that none is lost if a later one
        takes too long. Each check is ``"passed"``, ``"refused: …"`` in the library's own words, with the model
        unchanged, or ``"failed: …"``.
    """
    warnings.simplefilter("ignore")
    try:
        model, inputs = build(model_type)
    except Exception as error:  # whatever transformers raises for a config
        yield {"type": model_type, "built": False, "reason": one_line(error)}
        return
    found = {"type": model_type, "built": True, "class": type(model).__name__, **coverage(model)}
    found["inputs"] = {k: list(v.shape) for k, v in inputs.items() if isinstance(v, Tensor)}
    made: dict[str, str] = {}
    yield {**found, "checks": {}}
    for name in checks:
        made[name] = _checked(name, model, inputs)
        yield {**found, "checks": dict(made)}


def coverage(model: nn.Module) -> dict[str, Any]:
    """How many weights lie in matrices, and which of them the default targets cover, leave by choice, or miss.

    Args:
        model: Any model.

    Returns:
        Numbers of weights. A matrix has more than one row and column; embeddings and output embeddings are none.
    """
    config = hf_prune.PruningConfig(sparsity=0.5)
    heads = {id(p) for module in output_embeddings(model) for p in module.parameters()}
    heads |= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    sizes = {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.is_floating_point() and sum(size > 1 for size in p.shape) > 1 and id(p) not in heads
    }
    try:
        targets = resolve_targets(model, config)
    except HfPruneError:
        targets = []
    covered = sum(sizes.get(target.name, 0) for target in targets)
    chosen = {n: s for n, s in left_dense(model, config, targets).items() if n in sizes}
    names = {target.name for target in targets} | chosen.keys()
    missed = sorted(((size, name) for name, size in sizes.items() if name not in names), reverse=True)
    missed_by_us = passed_over(model, config, targets)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "matrices": sum(sizes.values()),
        "covered": covered,
        "dense_by_choice": sum(chosen.values()),
        "uncovered": sum(size for size, _ in missed),
        "largest_uncovered": missed[0][1] if missed else None,
        "uncovered_is_said": all(name in missed_by_us for _, name in missed),
    }


# --- one check ------------------------------------------------------------------------------------------


def _checked(name: str, model: Any, inputs: Mapping[str, Any]) -> str:
    """How a check on a copy of a model went."""
    work = hf_prune.prunable(copy.deepcopy(model))
    before = {key: value.clone() for key, value in work.state_dict().items()}
    try:
        detail = _RUNS[name](work, inputs)
    except HfPruneError as error:
        text = one_line(error)
        if getattr(work, "conformance_stage", None) is not None:
            return f"failed: after it was {work.conformance_stage}: {text}"
        unchanged = same_tensors(before, work.state_dict()) is None
        return f"refused: {text}" if unchanged else f"failed: the model was changed by a refusal: {text}"
    except Exception as error:  # anything that is not the library's own is a fault
        return f"failed: {type(error).__name__}: {one_line(error)}"
    return "passed" if detail is None else f"failed: {detail}"


def _check_dense(model: Any, inputs: Mapping[str, Any]) -> str | None:
    hf_prune.prune(model, 0.5)
    return _zeros(model) or _reloads(model, inputs, compressed=False, with_masks=True)


def _check_compressed(model: Any, inputs: Mapping[str, Any]) -> str | None:
    hf_prune.prune(model, 0.5)
    return _reloads(model, inputs, compressed=True, with_masks=True)


def _check_pairs(model: Any, inputs: Mapping[str, Any]) -> str | None:
    hf_prune.prune(model, granularity="2:4")
    return _zeros(model) or _reloads(model, inputs, compressed=True)


def _zeros(model: Any) -> str | None:
    """Whether what the masks remove is half of each weight that has one, and zero."""
    store = hf_prune.MaskStore.of(model)
    for name, mask in (store.masks if store is not None else {}).items():
        weight = model.get_parameter(name)
        if bool(weight.detach().masked_select(~mask.expand_as(weight)).any()):
            return f"{name} is not zero where it is masked"
        if abs(float((~mask).float().mean()) - 0.5) > 0.02:
            return f"{name} has {float((~mask).float().mean()):.3f} zeros"
    return None if store is not None and store.masks else "no masks"


def _check_training(model: Any, inputs: Mapping[str, Any]) -> str | None:
    hf_prune.prune(model, 0.5)
    store = hf_prune.MaskStore.of(model)
    masks = {name: mask.clone() for name, mask in store.masks.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.is_floating_point()], lr=1e-3)
    hf_prune.keep_sparse(model, optimizer)
    before = {name: model.get_parameter(name).detach().clone() for name in masks}
    model.train()
    for _ in range(2):
        torch.manual_seed(0)
        try:
            found = model(**inputs)
        except (AssertionError, ValueError):  # some want labels or longer texts in train mode
            found = model.eval()(**inputs)
        tensors = [t for t in tensors_in(found) if t.requires_grad and t.is_floating_point()]
        if not tensors:
            return "no output has a gradient"
        loss = sum(t.float().square().mean() for t in tensors)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, mask in masks.items():
        if bool(model.get_parameter(name).detach().masked_select(~mask.expand_as(before[name])).any()):
            return f"{name} has grown back"
    moved = any(not torch.equal(before[name], model.get_parameter(name)) for name in masks)
    return None if moved else "no pruned weight was trained"


def _check_units(kind: str) -> Callable[[Any, Mapping[str, Any]], str | None]:
    def check(model: Any, inputs: Mapping[str, Any]) -> str | None:
        parameters = model.num_parameters()
        scope = "global" if kind == "layer" else "layer"
        hf_prune.prune(model, 0.3, granularity=kind, criterion="magnitude", scope=scope)
        model.conformance_stage = "pruned"  # from here on, nothing may be refused
        masked = outputs(model, inputs)
        shrunk = hf_prune.shrink(copy.deepcopy(model))
        if shrunk.num_parameters() >= parameters:
            return "nothing was removed"
        found = outputs(shrunk, inputs)
        if (problem := differ(masked, found)) is not None and differ(masked, found, rounding(model, inputs, masked)):
            return f"shrunk: {problem}"
        return _reloads(shrunk, inputs, compressed=False)

    return check


def _reloads(model: Any, inputs: Mapping[str, Any], compressed: bool, with_masks: bool = False) -> str | None:
    """Whether what plain ``from_pretrained`` reads is what was saved, bit by bit, and runs alike."""
    model.conformance_stage = "pruned"
    native = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers."))
    expected = outputs(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model", compressed=compressed)
        loaded = native.from_pretrained(Path(folder) / "model").eval()
        again = hf_prune.prunable(native).from_pretrained(Path(folder) / "model") if with_masks else None
    if again is not None and (problem := _other_masks(model, again)) is not None:
        return f"loaded with its masks: {problem}"
    if (problem := same_tensors(model.state_dict(), loaded.state_dict())) is not None:
        return f"reloaded: {problem}"
    problem = differ(expected, outputs(loaded, inputs))
    return None if problem is None else f"reloaded: {problem}"


def _other_masks(model: Any, loaded: Any) -> str | None:
    """How a model that was loaded with its masks differs from the one that was saved; None if it does not."""
    stores = [hf_prune.MaskStore.of(m) for m in (model, loaded)]
    masks = [{} if store is None else store.masks for store in stores]
    return same_tensors(model.state_dict(), loaded.state_dict()) or same_tensors(*masks)


_RUNS: Mapping[str, Callable[[Any, Mapping[str, Any]], str | None]] = {
    "dense": _check_dense,
    "compressed": _check_compressed,
    "2:4": _check_pairs,
    "training": _check_training,
    **{kind: _check_units(kind) for kind in UNITS},
}


# --- comparing ------------------------------------------------------------------------------------------


@torch.no_grad()
def outputs(model: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors that a model returns, with the same noise each time."""
    model.eval()
    torch.manual_seed(0)
    return list(tensors_in(model(**inputs)))


def rounding(model: Any, inputs: Mapping[str, Any], expected: list[Tensor]) -> list[float]:
    """How far errors of rounding, of one unit in the last place of every weight, move each output at most.

    Some models make much of them, such as one that writes spectra from durations that it has found itself.
    """
    shaken = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in shaken.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1 + 1.2e-7 * torch.randn(parameter.shape, generator=generator).to(parameter))
    moved = outputs(shaken, inputs)
    pairs = zip(expected, moved, strict=True)
    return [float((a.double() - b.double()).abs().nan_to_num().max()) if a.numel() else 0.0 for a, b in pairs]


def differ(expected: list[Tensor], found: list[Tensor], noise: Sequence[float] = ()) -> str | None:
    """How outputs differ; None if they do not.

    Args:
        expected: The outputs of one model.
        found: The outputs of another one.
        noise: How far rounding alone moves each of them; twice that is no difference.
    """
    if [t.shape for t in expected] != [t.shape for t in found]:
        return f"outputs of shapes {[tuple(t.shape) for t in found]}, expected {[tuple(t.shape) for t in expected]}"
    for a, b, within in zip(expected, found, noise or [0.0] * len(expected), strict=True):
        if not a.is_floating_point():
            continue
        a, b = a.double(), b.double()
        finite = a.isfinite()
        if not bool((finite == b.isfinite()).all()):
            return "outputs are not finite in the same places"
        scale = max(1.0, float(a[finite].abs().max())) if bool(finite.any()) else 1.0
        if bool(finite.any()) and (worst := float((a[finite] - b[finite]).abs().max())) > max(
            _CLOSE * scale, 2 * within
        ):
            return f"outputs differ by {worst:.2g}, their largest value is {scale:.2g}"
    return None


def same_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """How two state dicts differ; None if they are equal, bit by bit."""
    if expected.keys() != found.keys():
        return f"other tensors: {sorted(expected.keys() ^ found.keys())[:3]}"
    bad = [name for name, tensor in expected.items() if not _equal(tensor, found[name])]
    return f"{len(bad)} of {len(expected)} tensors differ, such as {bad[0]}" if bad else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def one_line(error: BaseException) -> str:
    """An error in one line, without the folder of the installed packages."""
    return re.sub(r"/\S*site-packages/", "", " ".join(str(error).split()))[:600] or type(error).__name__
