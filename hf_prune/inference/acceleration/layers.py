"""Linear layers that choose their kernel by the number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import KernelError
from hf_prune.inference.acceleration.kernel import Kernel
from hf_prune.utils.notices import warn_user


@dataclass(frozen=True)
class Ranges:
    """Kernels by the number of tokens.

    Args:
        limits: The largest number of tokens of each range but the last, in rising order.
        kernels: The kernel of each range.
    """

    limits: tuple[int, ...]
    kernels: tuple[Kernel, ...]

    def kernel_for(self, tokens: int) -> Kernel:
        """The kernel for a number of tokens."""
        for limit, kernel in zip(self.limits, self.kernels, strict=False):
            if tokens <= limit:
                return kernel
        return self.kernels[-1]

    @property
    def reads_weight(self) -> bool:
        """Whether one of them reads the dense weight."""
        return any(kernel.reads_weight for kernel in self.kernels)

    def exact(self) -> Tensor | None:
        """(out, in): the weight from a kernel that holds all of it, bit for bit but for negative zeros, if one does."""
        weights = (kernel.to_dense() for kernel in self.kernels)
        return next((weight for weight in weights if weight is not None), None)

    def replace(self, weight: Tensor) -> bool:
        """Whether none of them reads the dense weight, and one holds every bit of it, in which no zero is negative."""
        if self.reads_weight or bool(((weight == 0) & weight.signbit()).any()):
            return False
        return self.exact() is not None

    @property
    def nbytes(self) -> int:
        """Bytes that the kernels hold; each is counted once."""
        return sum(kernel.nbytes for kernel in {id(k): k for k in self.kernels}.values())

    def bytes_with(self, weight: Tensor) -> int:
        """Bytes that the kernels hold, and those of the dense weight if it stays."""
        return self.nbytes + (0 if self.replace(weight) else weight.nbytes)


class _NoGradients(torch.autograd.Function):
    """A product through which no gradients flow: trying to is an error, not a wrong training."""

    @staticmethod
    def forward(ctx: Any, product: Callable[[Tensor], Tensor], x: Tensor, *parameters: Tensor | None) -> Tensor:
        """The product; of the parameters it counts only whether they are trained."""
        return product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        """Refuse.

        Raises:
            KernelError: Always.
        """
        raise KernelError("an accelerated model has no gradients: call decelerate() before training it")


class WeightWatch:
    """Notices that a weight was written to, by the count that autograd keeps; writes to ``weight.data`` do not count.

    Copies and pickles of a layer start anew, with the weight that they find.
    """

    def __init__(self) -> None:
        self._seen: tuple[int, int] | None = None

    def is_changed(self, weight: Tensor) -> bool:
        """Whether a weight is another one, or has other values, than at the first call."""
        if weight.is_inference():  # of which nothing is counted
            return False
        now = (id(weight), weight._version)
        self._seen = self._seen or now
        return self._seen != now

    def __deepcopy__(self, _: object) -> WeightWatch:
        return WeightWatch()

    def __reduce__(self) -> tuple[type[WeightWatch], tuple[()]]:
        return WeightWatch, ()


class Accelerated(nn.Module):
    """What an accelerated layer does in place of its class; it holds its weight, a placeholder, or both.

    Attributes:
        ranges: The kernels.
        watch: Notices writes to the weight, of which the kernels would know nothing.
        dense_class: The class of the layer without acceleration.
    """

    ranges: Ranges
    watch: WeightWatch
    dense_class: type[nn.Module]
    weight: Any  # a parameter
    bias: Any  # a parameter or None

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out), by the kernel for this number of tokens.

        An input of another precision than the weight's, as autocast makes them, is cast and the result cast back.

        Raises:
            KernelError: If the layer is in training mode.
        """
        if self.training:
            raise KernelError("an accelerated model is for inference: call decelerate() before training it, or eval()")
        if not torch.compiler.is_compiling() and self.watch.is_changed(self.weight):
            if self.weight.is_meta:
                raise KernelError(
                    "a weight of an accelerated model was written to, where only a placeholder is, so the new values "
                    "are lost: call decelerate(), write to it, and call accelerate() again"
                )
            self._end("a weight was written to")
            output: Tensor = self(input)
            return output
        if not torch.is_grad_enabled():
            return self._product(input)
        parameters = (self._parameters["weight"], self._parameters["bias"])
        if any(tensor is not None and tensor.requires_grad for tensor in (input, *parameters)):
            return _NoGradients.apply(self._product, input, *parameters)
        return self._product(input)

    def _product(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):  # asked first, since contexts take as long as small products
            with torch.autocast("cpu", enabled=False):
                return self._product(x)
        kernel = self.ranges.kernel_for(x.numel() // max(1, x.shape[-1]))
        bias, weight = self._parameters["bias"], self._parameters["weight"]
        assert weight is not None
        matrix = self.matrix() if kernel.reads_weight else None
        if x.dtype == weight.dtype:
            return kernel(x, matrix, bias)
        return kernel(x.to(weight.dtype), matrix, bias).to(x.dtype)

    def matrix(self) -> Tensor:
        """(out, in) of the weight."""
        return self.weight

    def dense_weight(self) -> Tensor:
        """The weight in the layout of the layer, bit for bit, whether or not it is in memory."""
        if not self.weight.is_meta:
            return self.weight.detach()
        weight = self.ranges.exact()
        assert weight is not None
        return weight

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense_weight()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The weights that are loaded are others than those of the kernels, so the layer is a plain one again."""
        self._end("other weights were loaded")
        self._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Where the model is moved or cast, the layer is a plain one again: its kernels were chosen for what it was."""
        probe = torch.empty(1, dtype=self.weight.dtype)
        moved = fn(probe)
        if moved.dtype == probe.dtype and moved.device == probe.device:
            return self
        self._end("it was moved or cast")
        return self._apply(fn, recurse)

    def _end(self, why: str) -> None:
        """Be a plain layer again."""
        warn_user(
            f"An accelerated model runs on torch's default kernels again, since {why}: call accelerate() afterwards, "
            f"to choose for what it is now."
        )
        switch_off(self)


class AcceleratedLinear(Accelerated, nn.Linear):
    """An accelerated ``nn.Linear``."""

    dense_class = nn.Linear


class AcceleratedConv1D(Accelerated, Conv1D):
    """An accelerated ``Conv1D`` of GPT-2, whose weight is (in, out)."""

    dense_class = Conv1D

    def forward(self, x: Tensor) -> Tensor:
        """See :meth:`Accelerated.forward`."""
        return super().forward(x)

    def matrix(self) -> Tensor:
        """See :meth:`Accelerated.matrix`."""
        return self.weight.t()

    def dense_weight(self) -> Tensor:
        """See :meth:`Accelerated.dense_weight`."""
        weight = super().dense_weight()
        return weight.t().contiguous() if self.weight.is_meta else weight


CLASSES: dict[type[nn.Module], type[Accelerated]] = {nn.Linear: AcceleratedLinear, Conv1D: AcceleratedConv1D}


def is_accelerated(model: nn.Module) -> bool:
    """Whether a layer of a model is accelerated."""
    return any(isinstance(module, Accelerated) for module in model.modules())


def switch_on(module: nn.Module, ranges: Ranges) -> None:
    """Have a layer use other kernels; its weight stays until :func:`drop_weight`."""
    module.__class__ = CLASSES[type(module)]
    module.ranges = ranges  # type: ignore[assignment]
    _watch(module)


def _watch(module: nn.Module) -> None:
    """Notice from now on if the weight of a layer is written to."""
    watch, weight = WeightWatch(), module._parameters["weight"]
    assert weight is not None
    watch.is_changed(weight)
    module.watch = watch  # type: ignore[assignment]


def drop_weight(module: nn.Module, shared: bool) -> None:
    """Replace the weight by a placeholder of its shape, if nothing reads it and every bit of it is kept elsewhere.

    Args:
        module: An accelerated layer.
        shared: Whether other modules have the same weight.
    """
    assert isinstance(module, Accelerated)
    old = module._parameters["weight"]
    assert old is not None
    if not shared and module.ranges.replace(old):
        module._parameters["weight"] = nn.Parameter(old.detach().to("meta"), requires_grad=old.requires_grad)
        _watch(module)


def switch_off(module: nn.Module) -> None:
    """Give a layer its weight and its class back."""
    assert isinstance(module, Accelerated)
    old = module._parameters["weight"]
    assert old is not None
    if old.is_meta:
        module._parameters["weight"] = nn.Parameter(module.dense_weight(), requires_grad=old.requires_grad)
    del module.ranges, module.watch
    cast(nn.Module, module).__class__ = module.dense_class
