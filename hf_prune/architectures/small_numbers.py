"""The numbers of one config, made small: widths keep their ratio to the hidden size, heads and experts are fewer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_prune.architectures import config_fields as fields
from hf_prune.architectures.config_sizes import attribute, first_width, hidden_size, number_of_layers, whole_number
from hf_prune.architectures.kept_layers import kept_layers, numbers_layers

_HEADS = 4
_VOCABULARY = 256
_SPECIAL = 64  # tokens at the end of the vocabulary, for those that were beyond it
_POSITIONS = 256
_EXPERTS = 4
_PIXELS = 64
_STAGES = 5
_NARROW = 16  # widths up to here stay
_WIDE = 1024  # no small model needs more
_MROPE = (16, 24, 24)  # sections of rotary embeddings of images, where the config leaves them to the code


@dataclass
class Shared:
    """What all configs of a composite model share, so that what is equal stays equal.

    Args:
        hidden: Small hidden size by hidden size.
        tokens: Small token id by token id.
        vocabulary: The number of tokens.
        joined: What a tower's outputs become that are as wide as itself, and not as the text model that reads them.
    """

    hidden: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    vocabulary: int = _VOCABULARY
    joined: int | None = None


@dataclass(frozen=True)
class Scale:
    """How the numbers of one config become small.

    Args:
        config: The config.
        shared: What is equal in all configs of the model.
        layers: How many layers the config has.
        kept: The numbers of those that stay.
        hidden: The width that the others are measured by.
        small_hidden: What it becomes.
        heads: Attention heads.
        small_heads: How many there will be.
        staged: Whether the config describes stages of different widths.
        most_layers: Up to how many layers all stay; None to have a few.
        widths: Whether widths, heads and experts stay as they are.
    """

    config: Any
    shared: Shared
    layers: int
    kept: tuple[int, ...]
    hidden: int
    small_hidden: int
    heads: int
    small_heads: int
    staged: bool
    most_layers: int | None = None
    widths: bool = False

    @classmethod
    def of(
        cls,
        config: Any,
        values: Mapping[str, Any],
        shared: Shared,
        most_layers: int | None = None,
        widths: bool = False,
    ) -> Scale:
        """Read the main sizes of a config, given its fields."""
        staged = any(isinstance(values.get(n), list | tuple) for n in ("depths", "hidden_sizes", "blocks_per_stage"))
        hidden = hidden_size(config) or 64
        if staged:
            hidden = first_width(values) or hidden
        heads = whole_number(config, "num_attention_heads", "num_heads", "n_head", "encoder_attention_heads") or 1
        small_hidden = min(hidden, 16 if staged else shared.hidden.get(hidden, 64))
        layers = number_of_layers(config)
        kept = kept_layers(values, layers) if most_layers is None else tuple(range(min(layers, most_layers)))
        small_heads = min(heads, _HEADS)
        if small_hidden % small_heads:
            small_heads = 2  # which divides every width that we give
        return cls(config, shared, layers, kept, hidden, small_hidden, heads, small_heads, staged, most_layers, widths)

    def value(self, name: str, value: Any) -> Any:
        """The small value of a field."""
        if isinstance(value, Mapping):
            return self._mapping(value)
        if isinstance(value, list | tuple) and len(value) > 0:
            return self._sequence(name, value)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            return value
        for pattern, rule in _RULES:
            if pattern.fullmatch(name):
                if self.widths and pattern in _WIDTHS:
                    return value
                return rule(self, name, value)
        return value

    # --- numbers --------------------------------------------------------------------------------------

    def _width(self, name: str, value: int) -> int:
        if fields.NO_WIDTH.fullmatch(name) and value != self.hidden:
            return value
        if value == self.hidden:
            return self.small_hidden
        if value in self.shared.hidden and not self.staged:
            return self.shared.hidden[value]
        if name.endswith("num_pos_feats") and 2 * value in self.shared.hidden:
            return self.shared.hidden[2 * value] // 2
        if value <= _NARROW:
            return value
        small = max(8, 8 * round(value * self.small_hidden / self.hidden / 8))
        # Of a projector between models, each with a width; channels may be halved several times.
        if small > _WIDE and hidden_size(self.config) is None and "channel" not in name:
            small = 8 * round(value / 512)
        if small == self.small_hidden:
            small += 8 if value > self.hidden else -8
        return min(small, value)

    def _groups(self, name: str, value: int) -> int:
        if value == self.heads:
            return self.small_heads
        least = 2 if self.heads == 1 else 1  # heads are counted in another config: several stay several
        return min(value, max(self.small_heads // 2, least))

    def _head_count(self, name: str, value: int) -> int:
        if value == self.heads:
            return self.small_heads
        ratio, count = value * self.small_heads / self.heads, 1
        while 2 * count <= min(ratio, 2 * _HEADS):
            count *= 2
        return min(value, max(count, 2))

    def _head_size(self, name: str, value: int) -> int:
        """Heads together are as wide as before, in units of the hidden size, where that is a whole number."""
        count = self._heads_of(name)
        if count is not None and (count * value % self.hidden == 0 or count * value in vars(self.config).values()):
            small_count = self.small_heads if count == self.heads else self._head_count(name, count)
            return max(count * value * self.small_hidden // self.hidden // small_count, 1)
        main = whole_number(self.config, "head_dim", "d_kv", "v_head_dim", "kv_channels") or self.hidden // self.heads
        small = max(8, 8 * round(2 * value / max(main, 1)))
        compressed = attribute(self.config, "v_head_dim") is not None  # then sizes of heads are sums of others
        if small * self.small_heads == self.small_hidden and value * self.heads != self.hidden and not compressed:
            small *= 2
        return min(small, value)

    def _heads_of(self, name: str) -> int | None:
        """How many heads have a size, by its name."""
        for suffix in ("d_head", "head_dim", "head_size"):
            if name.endswith(suffix) and name != suffix:
                prefix = name.removesuffix(suffix)
                return whole_number(self.config, *(prefix + n for n in ("n_heads", "num_heads", "num_attention_heads")))
        return self.heads

    def _pixels(self, name: str, value: int) -> int:
        patch = whole_number(self.config, "patch_size") or 8
        patch *= 2  # an even number of patches
        least = _PIXELS if self.staged else _PIXELS - 8
        return min(value, patch * -(-least // patch))

    def _window(self, name: str, value: int) -> int:
        """The last of four stages has 2 x 2 patches."""
        if name == "attention_window":
            return min(value, 8)
        return min(value, 2) if self.staged and attribute(self.config, "image_size") is not None else value

    def _token(self, name: str, value: int) -> int:
        if value < min(self.shared.vocabulary, _VOCABULARY - _SPECIAL):
            return value
        return self.shared.tokens.setdefault(value, self.shared.vocabulary - 1 - len(self.shared.tokens))

    def _layer_count(self, name: str, value: int) -> int:
        return value if self.staged and value <= _STAGES else min(value, self.most_layers or len(self.kept))

    def _interval(self, value: int, most: int) -> int:
        """What comes at every so many layers."""
        return min(value, most if self.most_layers is None else self.most_layers)

    def _expert_count(self, name: str, value: int) -> int:
        """More of them where they are chosen by groups, so that some of a group can go."""
        grouped = (whole_number(self.config, "n_group", "num_expert_group") or 1) > 1
        return min(value, 2 * _EXPERTS if grouped else _EXPERTS)

    def _expert_groups(self, name: str, value: int) -> int:
        routed = any(fields.EXPERTS.fullmatch(other) for other in vars(self.config))
        return min(value, 2) if routed else self._groups(name, value)

    # --- lists and mappings ---------------------------------------------------------------------------

    def _sequence(self, name: str, value: Sequence[Any]) -> Any:
        kind: Any = type(value)
        if numbers_layers(name, value, self.layers):
            return kind([new for new, old in enumerate(self.kept) if old in value] or [len(self.kept) - 1])
        if len(value) == self.layers and self.layers > 1 and not self.staged:  # one for each layer
            return kind(self.value(name, value[i]) if not isinstance(value[i], str) else value[i] for i in self.kept)
        if any(isinstance(item, list | tuple) for item in value):
            return value
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
            return value
        if "out_indices" in name:
            return (
                kind(range(1, len(value) + 1))
                if not self.staged and max(value) > max(len(value), self.most_layers or 0)
                else value
            )
        if fields.PIXELS.fullmatch(name):
            return kind(self._pixels(name, item) for item in value)
        if (self.staged and fields.LAYERS.fullmatch(name)) or name in ("depths", "blocks_per_stage"):
            return kind(min(item, self.most_layers or 2) for item in value)
        if fields.LAYER_INDEXES.fullmatch(name):
            if self.most_layers and max(value) < len(self.kept):
                return value
            first = 0 if value[0] == 0 else max(0, len(self.kept) - len(value))
            return kind(range(first, min(first + len(value), len(self.kept))))
        if self.widths and not fields.TOKEN.fullmatch(name) and not fields.PIXELS.fullmatch(name):
            return value
        if "heads" in name:
            divisor = math.gcd(*value)
            return kind(item // divisor * min(divisor, 2) for item in value)
        if fields.TOKEN.fullmatch(name):
            return kind(self._token(name, item) for item in value)
        if fields.WIDTH.fullmatch(name) and not fields.NO_WIDTH.fullmatch(name):
            return kind(self._width(name, item) for item in value)
        return value

    def _mapping(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """Rotary settings: sections and factors for a small head."""
        small = dict(value)
        if self.widths:
            return small
        head = self.small_hidden // self.small_heads
        if (size := whole_number(self.config, "head_dim")) is not None:
            head = self._head_size("head_dim", size)
        rotated = (
            int(head * (value.get("partial_rotary_factor") or attribute(self.config, "partial_rotary_factor") or 1.0))
            // 2
        )
        for key, item in value.items():
            if isinstance(item, Mapping):
                small[key] = self._mapping(item)
            elif key in ("short_factor", "long_factor") and isinstance(item, list | tuple):
                small[key] = list(item[:rotated])
        with_sections = "mrope_section" in getattr(self.config, "ignore_keys_at_rope_validation", ())
        if "mrope_section" in value or (with_sections and "rope_theta" in value):
            small["mrope_section"] = _sections(value.get("mrope_section", _MROPE), rotated)
        return small


_WIDTHS = {
    fields.EXPERT_GROUPS, fields.TOP_GROUPS, fields.EXPERTS, fields.TOP_K, fields.GROUPS, fields.HEAD_SIZE,
    fields.HEAD_COUNT, fields.QUERIES, fields.NORM_GROUPS, fields.AT_LEAST_32, fields.WIDTH,
}  # fmt: skip
_RULES: tuple[tuple[Any, Callable[[Scale, str, int], int]], ...] = (
    (fields.VOCAB, lambda scale, name, value: min(value, _VOCABULARY)),
    (fields.TABLE, lambda scale, name, value: min(value, 64)),
    (fields.POSITION, lambda scale, name, value: min(value, _POSITIONS)),
    (fields.FIRST_DENSE, lambda scale, name, value: scale._interval(value, 1)),
    (fields.FIXED, lambda scale, name, value: value),
    (fields.PIXELS, Scale._pixels),
    (fields.EXPERT_GROUPS, Scale._expert_groups),
    (fields.TOP_GROUPS, lambda scale, name, value: 1),
    (fields.EXPERTS, Scale._expert_count),
    (fields.TOP_K, lambda scale, name, value: min(value, 2)),
    (fields.PERIOD, lambda scale, name, value: scale._interval(value, 2)),
    (fields.OFFSET, lambda scale, name, value: scale._interval(value, 1)),
    (fields.GROUPS, Scale._groups),
    (fields.HEAD_SIZE, Scale._head_size),
    (fields.HEAD_COUNT, Scale._head_count),
    (fields.LAYER_INDEXES, lambda scale, name, value: min(value, len(scale.kept) - 1)),
    (fields.LAYERS, Scale._layer_count),
    (fields.TOKEN, Scale._token),
    (fields.WINDOW, Scale._window),
    (fields.QUERIES, lambda scale, name, value: min(value, 16)),
    (fields.NORM_GROUPS, lambda scale, name, value: min(value, 8)),
    (fields.AT_LEAST_32, lambda scale, name, value: min(value, 32)),
    (fields.WIDTH, Scale._width),
)


def _sections(sections: Sequence[int], half: int) -> list[int]:
    """Scale the sections of a rotary embedding to a sum of half a head."""
    small = [max(1, section * half // sum(sections)) for section in sections]
    small[0] += half - sum(small)
    return small
