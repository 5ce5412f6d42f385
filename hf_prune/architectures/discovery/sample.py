"""A small model of the same class and config as another, with random weights, to try things out on."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from hf_prune.architectures.small_models import example_inputs
from hf_prune.architectures.unit_groups import UnitSlice
from hf_prune.errors import ArchitectureError
from hf_prune.utils.forward import no_cache, tensors_in

# What models raise when they are built or run with sizes or inputs that they cannot take.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


LARGEST = 60_000_000  # parameters of a small model; nearly all have fewer than a million


@dataclass(frozen=True)
class Sample:
    """A small model and what it is run on.

    Args:
        model: The model, in eval mode, with weights that all matter.
        inputs: Keyword arguments of its forward pass.
        replaced: Names of the modules that its forward pass put in the place of others.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    replaced: frozenset[str] = frozenset()

    def outputs(self, model: nn.Module | None = None) -> list[Tensor]:
        """Every tensor of real numbers that the model puts out, in order.

        Args:
            model: A variant of the model to run in its place.
        """
        with torch.no_grad():
            result = (self.model if model is None else model)(**copy.copy(dict(self.inputs)))
        return [tensor.float() for tensor in tensors_in(result) if tensor.is_floating_point()]

    def twin(self) -> nn.Module:
        """A copy of the model, to cut; it shares what is not cut."""
        memo: dict[int, Any] = {id(tensor): tensor for tensor in self.model.parameters()}
        # As deepcopy, which spends most of its time on the empty dicts of hooks that every module has.
        plain = [module for module in self.model.modules() if not hasattr(type(module), "__deepcopy__")]
        memo |= {id(module): type(module).__new__(type(module)) for module in plain}
        for module in plain:
            for name, value in vars(module).items():
                is_empty = isinstance(value, dict) and not value
                vars(memo[id(module)])[name] = type(value)() if is_empty else copy.deepcopy(value, memo)
        return copy.deepcopy(self.model, memo)

    @contextmanager
    def zeroed(self, slices: Iterable[tuple[UnitSlice, Tensor]]) -> Iterator[None]:
        """Set slices of parameters to zero inside the context.

        Args:
            slices: Each with the units whose entries are zero.
        """
        before: dict[str, Tensor] = {}
        try:
            for piece, units in slices:
                parameter = self.model.get_parameter(piece.name).data
                before.setdefault(piece.name, parameter.clone())
                parameter.index_fill_(piece.dim, piece.index(units), 0)
            yield
        finally:
            for name, values in before.items():
                self.model.get_parameter(name).data.copy_(values)


def make_sample(model_class: Any, config: Any, most: int = LARGEST) -> Sample:
    """A small model with weights that all matter: random biases, norms and gates too.

    Args:
        model_class: A class of transformers' models.
        config: A small config; it is not changed.
        most: The most parameters that are small.

    Raises:
        ArchitectureError: If the model would not be small, since the config names its sizes in words of its own.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
    if parameters > most:
        raise ArchitectureError(
            f"its config does not tell which of its numbers are sizes, and {parameters:,} parameters are not small"
        )
    model = build_model(model_class, copy.deepcopy(config))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        _fill(name, parameter.data, generator)
    built = dict(model.named_modules())
    inputs = {**example_inputs(model), **no_cache(model)}
    replaced = {name for name, module in model.named_modules() if built.get(name) is not module}
    return Sample(model, inputs, frozenset(replaced))


def build_model(model_class: Any, config: Any) -> Any:
    """A model in eval mode with an attention of plain operations, whose derivatives are known."""
    return model_class._from_config(config, attn_implementation="eager").float().eval()


@contextmanager
def plain_surroundings() -> Iterator[None]:
    """Build and run models on the CPU, in float32 and with gradients, whatever surrounds it; leave no trace.

    A checkpoint is loaded on the meta device, in half precision, without initial values or without gradients.
    """
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    # The context of a device watches every operation: only what is in another one needs it.
    on_cpu = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with (
        torch.random.fork_rng(devices=[]),
        on_cpu,
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)  # several threads only wait for each other over tensors this small
        torch.manual_seed(0)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)


def _fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    """Random values that neither vanish nor explode over a few layers."""
    if not tensor.is_floating_point():
        return
    if tensor.dim() == 0:
        tensor.fill_(0.9)  # gates often start at zero, behind which nothing that is removed would show
    elif tensor.dim() == 1:
        is_scale = not name.endswith("bias")  # of a norm, mostly
        tensor.normal_(1.0 if is_scale else 0.0, 0.3, generator=generator)
    else:
        fan_in = max(tensor[0].numel(), 1)
        tensor.normal_(0.0, 1.5 * fan_in**-0.5, generator=generator)
