"""How much to remove so that a checkpoint is at most so large: a size becomes a sparsity, or a share of parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate.utils import convert_file_size_to_int
from torch import Tensor, nn

from hf_prune.checkpoint.packed.pack import pack
from hf_prune.errors import ConfigError, PlanError
from hf_prune.planning.choices import BUDGETS
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.make_plan import make_plan
from hf_prune.planning.traits import fixed_sparsity

_PIECES, _PIECE = 32, 1 << 11  # weights of a matrix that are packed to see how small it becomes, from all over it
_STEPS = 1000  # from sparsity 0 to 1
_MARGIN = 0.985  # of the size: values that a method computes anew compress a little less than those sampled
_HEADER = 200  # bytes that a safetensors file spends on the name and shape of a tensor, at most


def size_in_bytes(size: int | str) -> int:
    """A size such as ``"30MB"`` (of 1,000,000 bytes each) or ``"30MiB"`` in bytes.

    Raises:
        ConfigError: If it is not a size.
    """
    try:
        number = 0 if isinstance(size, bool) else convert_file_size_to_int(size)
    except (AttributeError, TypeError, ValueError):
        number = 0
    if number <= 0:
        raise ConfigError(f"target_size is {size!r}: expected a size in bytes, or a text such as '30MB' or '500KB'")
    return number


def with_target_size(model: nn.Module, config: PruningConfig, size: int | str) -> PruningConfig:
    """Settings that make a model's checkpoint at most so large.

    Where whole heads, neurons or layers go, that is the size of ``model.safetensors`` after ``shrink()``. Where weights
    become zeros, a plain checkpoint stays as large as it was, so it is that of the compressed one, see
    ``save_pretrained(compressed=True)``; parts of the matrices are packed to foretell it.

    Args:
        model: The model. It is not changed.
        config: All settings but how much is removed.
        size: In bytes, or a text such as ``"30MB"``.

    Raises:
        ConfigError: If the size is none, or contradicts settings that decide how much is removed, or the model is that
            small already.
        PlanError: If the settings cannot make it so small.
    """
    wanted = size_in_bytes(size)
    budgets = [name for name in BUDGETS if getattr(config, name) is not None]
    if budgets:
        raise ConfigError(f"target_size and {budgets[0]} are both set, and each decides how much goes: leave one out")
    if (fixed := fixed_sparsity(config)) is not None:
        raise ConfigError(
            f"target_size contradicts granularity={config.granularity!r}, which fixes the sparsity at {fixed:g}"
        )
    if config.removes_units:
        dense = sum(p.numel() * p.element_size() for p in model.parameters())
        rest = _HEADER * len(list(model.parameters())) + sum(
            b.numel() * b.element_size() for b in _saved_buffers(model)
        )
        share = (wanted - rest) / dense
        _refuse(wanted, dense + rest, "plain", smallest=rest)
        return config.replace(target_params=share)
    sizes = _PackedSizes(model, config)
    _refuse(wanted, sizes.at(0.0), "compressed", smallest=sizes.at(1 - 1 / _STEPS))
    low, high = 0, _STEPS - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if sizes.at(middle / _STEPS) <= _MARGIN * wanted else (middle, high)
    return config.replace(sparsity=high / _STEPS)


def _refuse(wanted: int, dense: float, kind: str, smallest: float) -> None:
    if dense <= wanted:
        raise ConfigError(
            f"target_size is {_megabytes(wanted)}, and the dense model's {kind} file has {_megabytes(dense)} "
            f"already: ask for less"
        )
    if smallest > _MARGIN * wanted:
        raise PlanError(
            f"target_size is {_megabytes(wanted)}, and what is not pruned takes {_megabytes(smallest)} of a "
            f"{kind} file: prune more (target_modules), trim the vocabulary, or save values='int8'"
        )


def _sample(tensor: Tensor) -> Tensor:
    """Evenly spaced pieces of a tensor: the first rows of an embedding are often unlike the others."""
    flat = tensor.reshape(-1)
    if flat.numel() <= _PIECES * _PIECE:
        return flat.cpu()
    starts = [number * (flat.numel() - _PIECE) // (_PIECES - 1) for number in range(_PIECES)]
    return torch.cat([flat[start : start + _PIECE] for start in starts]).cpu()


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.3g} MB"


def _saved_buffers(model: nn.Module) -> Iterator[Tensor]:
    state = model.state_dict(keep_vars=True)
    yield from (buffer for name, buffer in model.named_buffers() if name in state)


class _PackedSizes:
    """How large the compressed checkpoint is at a sparsity, from samples of the matrices.

    Args:
        model: The model.
        config: Which weights are pruned.
    """

    def __init__(self, model: nn.Module, config: PruningConfig) -> None:
        targets = {entry.target.name for entry in make_plan(model, config).tensors}
        self.rest = 0.0
        self.samples: list[tuple[Tensor, float]] = []  # weights, and how many times as many the matrix has
        for name, tensor in (*model.named_parameters(), *(("", buffer) for buffer in _saved_buffers(model))):
            values = _sample(tensor.detach())
            scale = tensor.numel() / max(1, values.numel())
            if name in targets:
                self.samples.append((values, scale))
            else:
                packs = tensor.dim() > 1 and name.endswith("weight")
                packed = len(pack(values)) * scale if packs else float("inf")
                self.rest += _HEADER + min(packed, tensor.numel() * tensor.element_size())

    def at(self, sparsity: float) -> float:
        """The size in bytes."""
        return self.rest + sum(self._packed(values, sparsity) * scale + _HEADER for values, scale in self.samples)

    @staticmethod
    def _packed(values: Tensor, sparsity: float) -> int:
        keep = values.abs().float().topk(round((1 - sparsity) * len(values))).indices
        mask = torch.zeros(len(values), dtype=torch.bool).index_fill(0, keep, True)
        return len(pack(values.where(mask, values.new_zeros(())), mask))
