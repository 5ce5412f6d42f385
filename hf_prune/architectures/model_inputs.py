"""Inputs to try on a model: guessed from what its forward pass takes and what its config says."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_prune.architectures.media_inputs import BATCH, find, media_inputs, noise

_LENGTH = 16
_PLACEHOLDER = re.compile(r"(image|video|audio|speech)_token")  # settings that hold a token in the place of other data
# What a forward pass raises on inputs of another kind or shape.
FORWARD_ERRORS: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


def candidate_inputs(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs to try on a model, those with the most kinds of data first; only text where it has nothing else.

    Args:
        model: A transformers model.

    Yields:
        Keyword arguments of its forward pass, two examples each.
    """
    takes = inspect.signature(model.forward).parameters
    text = _text(model, takes)
    media = list(media_inputs(model, takes))
    if text:
        for item in media:
            yield from (_completed(model, takes, case) for case in _with_placeholders(model, takes, text, item))
        yield _completed(model, takes, text)
        yield from (_completed(model, takes, case) for case in (*_ended(model, text), *_codes(model, text)))
    for item in media:
        yield _completed(model, takes, item)
        if "decoder_input_ids" in takes:
            yield _completed(model, takes, {**item, "decoder_input_ids": _tokens(model, 4)})
    if not text and not media:
        yield _completed(model, takes, {})
    yield from _by_kind(model, takes)


def _by_kind(model: Any, takes: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What a class of custom code names as examples; else tokens, images or vectors, under whatever names it takes."""
    if isinstance(examples := getattr(model, "dummy_inputs", None), Mapping):
        yield {name: value for name, value in examples.items() if name in takes}
    plain = {n: p for n, p in takes.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    main = getattr(model, "main_input_name", None)
    names = [n for n, p in plain.items() if p.default is p.empty] or [n for n in plain if n == main] or [*plain][:1]
    hidden = find(model.config, "hidden_size", "d_model", "dim", "embed_dim", "hidden_dim", "width")
    embeddings = [m.embedding_dim for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    features = [m.in_features for m in model.modules() if isinstance(m, torch.nn.Linear)]
    channels = [m.in_channels for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    kinds = [_tokens(model)] if embeddings else []
    kinds += [
        noise(BATCH, channels[0], side, side)
        for side in (find(model.config, "image_size"), 64)
        if channels and isinstance(side, int)
    ]
    for width in dict.fromkeys(size for size in (*features[:1], hidden) if isinstance(size, int)):
        kinds += [noise(BATCH, _LENGTH, width), noise(BATCH, width)]
    for value in kinds if names else []:
        yield dict.fromkeys(names, value)
    if "encoder_hidden_states" in takes:
        states = noise(
            BATCH, 8, find(model.config, "encoder_hidden_size", "cross_attention_hidden_size", "hidden_size")
        )
        yield _completed(model, takes, {**_text(model, takes), "encoder_hidden_states": states})


# --- text -----------------------------------------------------------------------------------------------


def _tokens(model: Any, length: int = _LENGTH) -> Tensor:
    """Ordinary tokens of the text model, none of which stands for an image or a sound."""
    text = text_config(model.config)
    known = next((v for n in ("vocab_size", "input_vocab_size") if isinstance(v := getattr(text, n, None), int)), 64)
    generator = torch.Generator().manual_seed(0)
    placeholders = {v for n, v in vars(model.config).items() if _PLACEHOLDER.match(n) and isinstance(v, int)}
    ids = torch.randint(min(3, known - 1), min(known, 160), (BATCH, length), generator=generator)
    for token in placeholders & set(ids.unique().tolist()):
        ids[ids == token] = next((other for other in range(3, known) if other not in placeholders), 0)
    return ids


def text_config(config: Any) -> Any:
    """The config of the text model; of several, that of the decoder."""
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(decoder=True)


def _text(model: Any, takes: Mapping[str, Any]) -> dict[str, Any]:
    if "input_ids" not in takes:
        return {}
    ids = _tokens(model)
    text: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in takes:
        text["attention_mask"] = torch.ones_like(ids)
    if "decoder_input_ids" in takes:
        text["decoder_input_ids"] = _tokens(model, 6)
    return text


def _ended(model: Any, text: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Text that ends with the end of a sequence, which classifiers of sequences with a decoder look for."""
    end = getattr(model.config, "eos_token_id", None)
    if isinstance(end, int) and "decoder_input_ids" in text:
        ids = text["input_ids"].clone()
        ids[ids == end] = 3 if end != 3 else 4
        ids[:, -1] = end
        yield {k: v for k, v in {**text, "input_ids": ids}.items() if not k.startswith("decoder")}


def _codes(model: Any, text: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Several tokens at each position, as models of sound have them."""
    for name, extra in (("num_codebooks", 1), ("num_codebooks", 0), ("num_channels", 0)):
        if isinstance(streams := find(model.config, name), int):
            each = {k: v[..., None].expand(*v.shape, streams + extra) for k, v in text.items() if "input_ids" in k}
            yield {**text, **each}
            yield {**text, **{k: v for k, v in each.items() if k.startswith("decoder")}}
            if not extra and "decoder_input_ids" in text:  # one after the other
                yield {**text, "decoder_input_ids": text["decoder_input_ids"].repeat(streams, 1)}


def _kind(media: Mapping[str, Any]) -> str:
    if any("video" in name for name in media):
        return "video"
    return "image" if any("pixel" in name for name in media) else "audio"


def _with_placeholders(
    model: Any, takes: Mapping[str, Any], text: Mapping[str, Any], media: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Text with placeholder tokens in the places of images or sounds; also without, for models that keep them apart."""
    kind = _kind(media)
    token = next(
        (
            v
            for n in ("token_id", "token_index", "token")
            if isinstance(v := getattr(model.config, f"{kind}_{n}", None), int)
        ),
        None,
    )
    count = _feature_count(model, kind, media) if token is not None else None
    if token is not None and count and count <= 1024:
        each = -(-count // BATCH)
        ids = torch.cat([_tokens(model, 4), torch.full((BATCH, each), token), _tokens(model, 6)], dim=1)
        if count % BATCH:
            ids[-1, 4] = 5  # the last example has fewer
        case = {**text, "input_ids": ids, **media}
        if "attention_mask" in text:
            case["attention_mask"] = torch.ones_like(ids)
        if "mm_token_type_ids" in takes:
            case["mm_token_type_ids"] = (ids == token).int() * (2 if kind == "video" else 1)
        yield case
    yield {**text, **media}


def _feature_count(model: Any, kind: str, media: Mapping[str, Any]) -> int | None:
    """How many placeholder tokens images or sounds take: as many as they have features of the text model's size."""
    holders = (model, getattr(model, "model", None))
    get = next((f for m in holders if callable(f := getattr(m, f"get_{kind}_features", None))), None)
    if get is None:
        return None
    accepts = inspect.signature(get).parameters
    try:
        found = get(**{k: v for k, v in media.items() if k in accepts})
    except FORWARD_ERRORS:
        return None
    width = getattr(text_config(model.config), "hidden_size", None)
    return _vectors(getattr(found, "pooler_output", found), width)


def _vectors(features: Any, width: int | None) -> int | None:
    if isinstance(features, Tensor):
        return features.numel() // width if width and features.shape[-1] == width else None
    if isinstance(features, list | tuple):
        return sum(count for item in features if (count := _vectors(item, width))) or None
    return None


# --- the rest -------------------------------------------------------------------------------------------

# Arguments that follow from the others, by name.
_COMPANIONS: Mapping[str, Callable[[Any, Mapping[str, Any]], Any]] = {
    "bbox": lambda model, inputs: _boxes(model, inputs),
    "visual_feats": lambda model, inputs: noise(BATCH, 4, find(model.config, "visual_feat_dim")),
    "visual_pos": lambda model, inputs: noise(BATCH, 4, 4).sigmoid(),
    "qformer_input_ids": lambda model, inputs: _tokens(model, 4),
    "task_inputs": lambda model, inputs: torch.ones(BATCH, find(model.config, "task_seq_len") or 77, dtype=torch.long),
    "input_ids": lambda model, inputs: _tokens(model),
    "freq": lambda model, inputs: torch.zeros(BATCH, 1, dtype=torch.long),
    "merge_sizes": lambda model, inputs: torch.ones(BATCH, dtype=torch.long),
    "query_embeds": lambda model, inputs: noise(BATCH, 4, find(model.config, "hidden_size")),
    "inputs": lambda model, inputs: noise(BATCH, 8, find(model.config, "d_model", "hidden_size")),
    "inputs_embeds": lambda model, inputs: noise(BATCH, 8, find(model.config, "hidden_size")),
    "hidden_states": lambda model, inputs: noise(BATCH, find(model.config, "hidden_size", "codebook_dim"), 16),
    "latents": lambda model, inputs: noise(BATCH, find(model.config, "hidden_size"), 16),
    "pixel_position_ids": lambda model, inputs: torch.stack(
        torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), dim=-1
    ).reshape(1, 16, 2).expand(BATCH, 16, 2),
    "pixel_attention_mask": lambda model, inputs: _patch_mask(inputs),
    "action_embeds": lambda model, inputs: noise(BATCH, 4, find(model.config, "dit_hidden_size", "hidden_size")),
    "input_features": lambda model, inputs: noise(BATCH, 64, find(model.config, "feature_projection_input_dim") or 80),
    "image_embeds_position_mask": lambda model, inputs: torch.ones(BATCH, _LENGTH, dtype=torch.long),
    "image_attention_mask": lambda model, inputs: torch.ones(BATCH, inputs["input_ids"].shape[1], 1),
}  # fmt: skip
_ALWAYS = {"image_embeds_position_mask", "bbox", "visual_feats", "visual_pos"}  # although their default is None


def _completed(model: Any, takes: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with the arguments that have no default and follow from them."""
    complete = {**inputs, **({"use_cache": False} if "use_cache" in takes else {})}
    for name, parameter in takes.items():
        wanted = parameter.default is parameter.empty or name in _ALWAYS
        if wanted and name not in complete and name in _COMPANIONS:
            complete[name] = _COMPANIONS[name](model, complete)
    return complete


def _boxes(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Boxes of words: whole numbers where the model looks them up."""
    boxes = torch.tensor([1, 1, 5, 5]).expand(BATCH, inputs["input_ids"].shape[1] if "input_ids" in inputs else 4, 4)
    looked_up = find(model.config, "max_2d_position_embeddings") is not None
    return boxes if looked_up and model.config.model_type != "udop" else boxes / 8


def _patch_mask(inputs: Mapping[str, Any]) -> Tensor:
    pixels = inputs["pixel_values"]
    return torch.ones(
        pixels.shape[:2] if pixels.dim() == 3 else (*pixels.shape[:-3], *pixels.shape[-2:]), dtype=torch.long
    )
