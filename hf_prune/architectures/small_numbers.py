"""The numbers of one config, made small: widths keep their ratio to the hidden size, heads and experts are fewer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hf_prune.architectures.config_fields import (
    EXPERTS,
    GROUPS,
    HEAD_COUNT,
    HEAD_SIZE,
    LAYER_INDEXES,
    LAYERS,
    NO_WIDTH,
    PERIOD,
    POSITION,
    TOKEN,
    TOP_K,
    VOCAB,
    WIDTH,
)

_HEADS = 4
_VOCABULARY = 256
_POSITIONS = 256
_PIXELS = 64
_NARROW = 16  # widths up to here stay


@dataclass
class Shared:
    """What all configs of a composite model share, so that what is equal stays equal.

    Args:
        hidden: Small hidden size by hidden size.
        tokens: Small token id by token id.
    """

    hidden: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)


def whole_number(config: Any, *names: str) -> int | None:
    """The first of some attributes that is a whole number."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


@dataclass(frozen=True)
class Scale:
    """How the numbers of one config become small."""

    config: Any
    shared: Shared
    layers: int  # how many layers the config has
    kept: tuple[int, ...]  # layers that stay, by number
    hidden: int
    small_hidden: int
    heads: int
    small_heads: int
    head_size: int
    hierarchical: bool

    @classmethod
    def of(cls, config: Any, values: Mapping[str, Any], shared: Shared) -> Scale:
        """Read the main sizes of a config."""
        stages = [v for v in values.values() if isinstance(v, list | tuple) and len(v) > 1]
        hierarchical = any(name in values for name in ("depths", "num_hidden_groups_per_stage", "hidden_sizes"))
        hidden = whole_number(config, "hidden_size", "d_model", "dim", "embed_dim", "n_embd")
        if hidden is None or hierarchical:
            hidden = _first_width(values) or hidden or 64
        heads = whole_number(config, "num_attention_heads", "num_heads", "n_head", "encoder_attention_heads") or 1
        small_heads = _HEADS if heads > _HEADS else heads
        small_hidden = min(hidden, 16 if hierarchical else shared.hidden.get(hidden, 64))
        layers = whole_number(config, "num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "depth") or 1
        head_size = whole_number(config, "head_dim", "d_kv", "v_head_dim", "kv_channels") or max(hidden // heads, 1)
        del stages
        return cls(
            config, shared, layers, _kept_layers(config, values, layers), hidden, small_hidden, heads, small_heads,
            head_size, hierarchical,
        )  # fmt: skip

    def value(self, name: str, value: Any) -> Any:
        """The small value of a field."""
        if isinstance(value, Mapping):
            return self.mapping(name, value)
        if isinstance(value, list | tuple) and len(value) > 0:
            return self.sequence(name, value)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            return value
        return self.number(name, value)

    def number(self, name: str, value: int) -> int:
        """The small value of a field that is a positive whole number."""
        if VOCAB.fullmatch(name):
            return min(value, _VOCABULARY)
        if POSITION.fullmatch(name):
            return min(value, _POSITIONS)
        if name == "image_size" or name.endswith("_image_size"):
            return self.pixels(value)
        if name == "window_size" and self.hierarchical and hasattr(self.config, "image_size"):
            return min(value, 2)  # the last stage has 2 x 2 patches
        if name.startswith("first_k_dense") or name == "num_kv_shared_layers":
            return 1
        if name.startswith(("n_group", "num_expert_group", "topk_group", "num_limited")) and _experts(self.config):
            return min(value, 1 if name.startswith("topk") else 2)
        if EXPERTS.fullmatch(name):
            return min(value, 4)
        if TOP_K.fullmatch(name):
            return min(value, 2)
        if PERIOD.fullmatch(name):
            return min(value, 2)
        if name.endswith("_offset") and value < self.layers:
            return min(value, 1)
        if GROUPS.fullmatch(name):
            return self.groups(value)
        if HEAD_COUNT.fullmatch(name):
            return self.head_count(value)
        if HEAD_SIZE.fullmatch(name):
            return self.size_of_head(name, value)
        if (
            LAYER_INDEXES.fullmatch(name)
            and not name.startswith("num_")
            and "encoder_layers" not in name
            and "decoder_layers" not in name
        ):
            return self.layer_index(value)
        if LAYERS.fullmatch(name) and "feat_extract" not in name and "postnet" not in name:
            return min(value, len(self.kept) if value == self.layers else 2)
        if TOKEN.fullmatch(name):
            return self.token(value)
        if WIDTH.fullmatch(name) and not NO_WIDTH.fullmatch(name):
            return self.width(value)
        return value

    def width(self, value: int) -> int:
        """The small value of a width: its ratio to the hidden size stays."""
        if value == self.hidden:
            return self.small_hidden
        if value in self.shared.hidden and not self.hierarchical:
            return self.shared.hidden[value]
        if value <= _NARROW:
            return value
        small = max(8, 8 * round(value * self.small_hidden / self.hidden / 8))
        if small == self.small_hidden:
            small += 8 if value > self.hidden else -8
        return min(small, value)

    def groups(self, value: int) -> int:
        """Heads of keys and values, or groups of states."""
        if value == self.heads:
            return self.small_heads
        return min(value, max(self.small_heads // 2, 1))

    def head_count(self, value: int) -> int:
        """Heads, of which other parts of the model may have more or fewer."""
        if value == self.heads:
            return self.small_heads
        ratio = value * self.small_heads / self.heads
        count = 1
        while 2 * count <= min(ratio, 8):
            count *= 2
        return min(value, max(count, 2))

    def size_of_head(self, name: str, value: int) -> int:
        """The size of a head: all heads together are as wide as before, in units of the hidden size."""
        count = self.partner(name)
        if count is not None and count * value % self.hidden == 0:
            return max(count * value // self.hidden * self.small_hidden // self.head_count(count), 1)
        small = max(8, 8 * round(value / self.head_size * 2))
        if small * self.small_heads == self.small_hidden and value * self.heads != self.hidden:
            small *= 2
        return min(small, value)

    def partner(self, name: str) -> int | None:
        """How many heads have a size."""
        for suffix, counts in (
            ("d_head", ("n_heads",)),
            ("head_dim", ("num_heads", "n_heads")),
            ("head_size", ("num_heads",)),
        ):
            if name.endswith(suffix) and name != suffix:
                for count in counts:
                    found = whole_number(self.config, name.removesuffix(suffix) + count)
                    if found is not None:
                        return found
                return None
        return self.heads

    def pixels(self, value: int) -> int:
        """The small size of an image: an even number of patches."""
        patch = whole_number(self.config, "patch_size") or 1
        while patch * 2 < 8:
            patch *= 2
        least = _PIXELS if self.hierarchical else 56
        return min(value, 2 * patch * -(-least // (2 * patch)))

    def token(self, value: int) -> int:
        """A token within the small vocabulary; different tokens stay different."""
        if value < _VOCABULARY - 64:
            return value
        return self.shared.tokens.setdefault(value, _VOCABULARY - 1 - len(self.shared.tokens))

    def layer_index(self, value: int) -> int:
        """The number of a layer among those that stay."""
        return min(value, len(self.kept) - 1)

    def sequence(self, name: str, value: Sequence[Any]) -> Any:
        """The small value of a list: per layer, of layers, per stage."""
        kind: Any = type(value)
        if len(value) == self.layers and self.layers > 1 and not self.hierarchical:
            return kind(self.value(name, value[i]) if not isinstance(value[i], str) else value[i] for i in self.kept)
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        if not whole:
            return (
                kind(self.sequence(name, v) if isinstance(v, list | tuple) else v for v in value)
                if any(isinstance(v, list | tuple) for v in value) and "pinpoints" not in name
                else value
            )
        if "out_indices" in name or "out_features" in name:
            return kind(range(1, len(value) + 1)) if not self.hierarchical and max(value) > len(value) else value
        if name in ("depths", "blocks_per_stage", "layers"):
            return kind(min(v, 2) for v in value)
        if LAYER_INDEXES.fullmatch(name):
            most = len(self.kept)
            return kind(range(max(0, most - len(value)), most))
        if "heads" in name:
            divisor = math.gcd(*value)
            return kind(v // divisor * min(divisor, 2) for v in value)
        if name == "image_size":
            return kind(self.pixels(v) for v in value)
        if TOKEN.fullmatch(name):
            return kind(self.token(v) for v in value)
        if WIDTH.fullmatch(name) and not NO_WIDTH.fullmatch(name):
            return kind(self.width(v) for v in value)
        return value

    def mapping(self, name: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """The small value of rotary settings: sections and factors as many as half a small head has."""
        small = dict(value)
        head = self.size_of_head("head_dim", self.head_size)
        for key, item in value.items():
            if isinstance(item, Mapping):
                small[key] = self.mapping(key, item)
            elif key == "mrope_section":
                small[key] = _sections(item, head)
            elif key in ("short_factor", "long_factor") and isinstance(item, list | tuple):
                small[key] = list(item[: head // 2])
        return small


def _sections(sections: Sequence[int], head: int) -> list[int]:
    """Scale the sections of a rotary embedding, whose sum is half a head."""
    total, half = sum(sections), head // 2
    small = [max(1, section * half // total) for section in sections]
    small[0] += half - sum(small)
    return small


def _first_width(values: Mapping[str, Any]) -> int | None:
    """The width of the first stage."""
    for name in ("embed_dim", "hidden_sizes", "embed_dims", "embed_dim_per_stage", "embedding_size", "stem_channels"):
        value = values.get(name)
        if isinstance(value, list | tuple) and value and isinstance(value[0], int):
            value = min(value)
        if isinstance(value, int):
            return value
    return None


def _experts(config: Any) -> bool:
    return any(EXPERTS.fullmatch(name) for name in vars(config))


def _kept_layers(config: Any, values: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Which layers stay: the first of each kind, at least two, and as many as the config's rules and lists need."""
    per_layer = [v for v in values.values() if isinstance(v, list | tuple) and len(v) == layers and layers > 1]
    kinds = [tuple(str(v[i]) for v in per_layer) for i in range(layers)]
    firsts = {kinds.index(kind) for kind in dict.fromkeys(kinds)} if per_layer else set()
    rules = [
        v for n, v in values.items() if (PERIOD.fullmatch(n) or n.startswith("first_k_dense")) and isinstance(v, int)
    ]
    outputs = max((len(v) for n, v in values.items() if "out_indices" in n and isinstance(v, list | tuple)), default=0)
    least = max(2 + sum(bool(v) and v > 0 for v in rules[:1]), outputs)
    for number in range(layers):
        if len(firsts) >= min(least, layers):
            break
        firsts.add(number)
    return tuple(sorted(firsts))
