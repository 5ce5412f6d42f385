"""Linear layers that choose their kernel by the number of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_prune.errors import KernelError
from hf_prune.inference.acceleration.kernels import Kernel, Sparse
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

    def exact(self) -> Sparse | None:
        """A kernel that holds every weight of the layer bit for bit, if there is one."""
        return next((kernel for kernel in self.kernels if isinstance(kernel, Sparse)), None)

    @property
    def nbytes(self) -> int:
        """Bytes that the kernels hold; each is counted once."""
        return sum(kernel.nbytes for kernel in {id(k): k for k in self.kernels}.values())


class _NoGradients(torch.autograd.Function):
    """A product through which no gradients flow: trying to is an error, not a wrong training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
        """The product."""
        return product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        """Refuse.

        Raises:
            KernelError: Always.
        """
        raise KernelError("an accelerated model has no gradients: call decelerate() before training it")


class Accelerated(nn.Module):
    """What an accelerated layer does in place of its class; it holds its weight, a placeholder, or both.

    Attributes:
        ranges: The kernels.
        dense_class: The class of the layer without acceleration.
    """

    ranges: Ranges
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
        kernel = self.ranges.kernel_for(input.numel() // max(1, input.shape[-1]))

        def product(x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                result = kernel(x.to(self.weight.dtype), self.matrix() if kernel.reads_weight else None, self.bias)
                return result.to(x.dtype)

        if torch.is_grad_enabled() and input.requires_grad:
            return _NoGradients.apply(input, product)
        with torch.no_grad():
            return product(input)

    def matrix(self) -> Tensor:
        """(out, in) of the weight."""
        return self.weight

    def dense_weight(self) -> Tensor:
        """The weight in the layout of the layer, bit for bit, whether or not it is in memory."""
        if not self.weight.is_meta:
            return self.weight.detach()
        sparse = self.ranges.exact()
        assert sparse is not None
        return sparse.rows.to_dense()

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


def drop_weight(module: nn.Module, shared: bool) -> None:
    """Replace the weight by a placeholder of its shape, if nothing reads it and every bit of it is kept elsewhere.

    Args:
        module: An accelerated layer.
        shared: Whether other modules have the same weight.
    """
    assert isinstance(module, Accelerated)
    if not shared and not module.ranges.reads_weight and module.ranges.exact() is not None:
        old = module._parameters["weight"]
        assert old is not None
        if bool(((old == 0) & old.signbit()).any()):
            return  # negative zeros, which sparse formats lose
        module._parameters["weight"] = nn.Parameter(old.detach().to("meta"), requires_grad=old.requires_grad)


def switch_off(module: nn.Module) -> None:
    """Give a layer its weight and its class back."""
    assert isinstance(module, Accelerated)
    old = module._parameters["weight"]
    assert old is not None
    if old.is_meta:
        module._parameters["weight"] = nn.Parameter(module.dense_weight(), requires_grad=old.requires_grad)
    del module.ranges
    cast(nn.Module, module).__class__ = module.dense_class
