"""Dense ways to compute a linear layer."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_prune.inference.acceleration.kernel import Kernel

_AGREES = 1e-5  # the largest difference of oneDNN in float32, as a share of the largest output
_LEAST_LEFT_OUT = 0.05  # share of a weight in rows and columns of zeros; with less, gathering takes longer


class Dense(Kernel):
    """What torch does by default."""

    name = "dense"
    reads_weight = True

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See :meth:`Kernel.__call__`."""
        assert weight is not None
        return linear(x, weight, bias)


class OneDNN(Kernel):
    """The dense product of oneDNN in float32, which torch does not use by itself where MKL is there."""

    name = "onednn"
    reads_weight = True

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See :meth:`Kernel.__call__`."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product


@functools.cache
def onednn_agrees() -> bool:
    """Whether oneDNN is there, and multiplies float32 matrices as exactly as torch's default on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(32, 512, generator=generator), torch.randn(256, 512, generator=generator)
    with torch.no_grad():
        expected = linear(x.double(), weight.double())
        difference = (OneDNN()(x, weight, None) - expected).abs().max()
    return float(difference) <= _AGREES * float(expected.abs().max())


class Int8(Kernel):
    """Weights of 8 bits with a scale for each row, inputs of 8 bits with a scale for each token, sums of 32 bits."""

    name = "dense:int8"

    def __init__(self, weight: Tensor) -> None:
        scales = weight.detach().float().abs().amax(1) / 127  # (out,)
        self.scales = scales.where(scales != 0, 1.0)  # one of NaN stays, and makes the output NaN
        self.steps = (weight.detach().float() / self.scales.unsqueeze(1)).round_().to(torch.int8)

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See :meth:`Kernel.__call__`."""
        tokens = x.reshape(-1, x.shape[-1]).float()  # (tokens, in)
        scales = tokens.abs().amax(1, keepdim=True) / 127
        scales = scales.where(scales != 0, 1.0)
        sums = torch._int_mm((tokens / scales).round_().to(torch.int8), self.steps.t())
        product = sums.float().mul_(scales).mul_(self.scales)
        if bias is not None:
            product += bias
        return product.to(x.dtype).view(*x.shape[:-1], product.shape[-1])

    @property
    def nbytes(self) -> int:
        """See :attr:`Kernel.nbytes`."""
        return self.steps.numel() + 4 * self.scales.numel()


class Compact(Kernel):
    """A dense product without the rows and columns of the weight that are all zero.

    Args:
        weight: (out, in).
        product: The kernel for what is left.
    """

    def __init__(self, weight: Tensor, product: Kernel) -> None:
        self.shape = tuple(weight.shape)
        self.rows, self.columns = _with_weights(weight)
        self.weight = weight.detach()[self.rows][:, self.columns].contiguous()
        self.product = product
        self.name = f"compact:{product.name}"

    @staticmethod
    def suits(weight: Tensor) -> bool:
        """Whether enough rows and columns are all zero, and something is left."""
        rows, columns = _with_weights(weight)
        return 0 < len(rows) * len(columns) <= (1 - _LEAST_LEFT_OUT) * weight.numel()

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See :meth:`Kernel.__call__`."""
        outputs, inputs = self.shape
        if len(self.columns) < inputs:
            x = x.index_select(-1, self.columns)
        part = self.product(x, self.weight, None)
        if len(self.rows) == outputs:
            return part if bias is None else part + bias
        out = part.new_zeros(*part.shape[:-1], outputs).index_copy_(-1, self.rows, part)
        return out if bias is None else out.add_(bias)

    def to_dense(self) -> Tensor:
        """See :meth:`Kernel.to_dense`."""
        weight = self.weight.new_zeros(self.shape)
        weight[self.rows.unsqueeze(1), self.columns] = self.weight
        return weight

    @property
    def nbytes(self) -> int:
        """See :attr:`Kernel.nbytes`."""
        return sum(t.numel() * t.element_size() for t in (self.weight, self.rows, self.columns))


def _with_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of the rows and of the columns that are not all zero."""
    kept = weight.detach() != 0
    return kept.any(1).nonzero().view(-1), kept.any(0).nonzero().view(-1)
