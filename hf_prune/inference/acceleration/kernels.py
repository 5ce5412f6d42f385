"""The ways to compute one linear layer that compete with one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_prune.kernels.sparse.build import kernel_problem, load_kernel
from hf_prune.kernels.sparse.sparse_rows import WIDEST_CHUNK, SparseRows

CHUNKS = (192, 384, WIDEST_CHUNK)  # inputs of a chunk that are tried: for 64 tokens, for 32, and for few
_LEAST_SPARSITY = 0.3  # below it no sparse kernel has ever been the fastest


class Kernel:
    """A way to compute ``x @ weight.T + bias``.

    Attributes:
        name: Its name in reports and records.
        reads_weight: Whether it reads the dense weight, which then stays in memory.
    """

    name: str
    reads_weight: ClassVar[bool] = False

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out)."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes that it holds besides the dense weight."""
        return 0


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


class Sparse(Kernel):
    """The sparse kernel of hf_prune."""

    def __init__(self, weight: Tensor, chunk: int) -> None:
        load_kernel()
        self.rows = SparseRows.from_dense(weight, chunk)
        self.name = f"sparse:{chunk}"

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See :meth:`Kernel.__call__`."""
        return self.rows.linear(x, bias)

    @property
    def nbytes(self) -> int:
        """See :attr:`Kernel.nbytes`."""
        return self.rows.nbytes

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled in a process that may not have loaded the kernel."""
        load_kernel()
        self.__dict__.update(state)
        self.rows.__post_init__()  # the kernel reads where it is told to


class Csr(Kernel):
    """torch's own sparse matrices, ``(W @ Xᵀ)ᵀ``."""

    name = "csr"

    def __init__(self, weight: Tensor) -> None:
        import warnings

        with warnings.catch_warnings():  # that CSR is in beta
            warnings.simplefilter("ignore", UserWarning)
            self.matrix = weight.detach().to_sparse_csr()

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See :meth:`Kernel.__call__`."""
        product = (self.matrix @ x.reshape(-1, x.shape[-1]).t()).t()
        product = product if bias is None else product + bias
        return product.reshape(*x.shape[:-1], product.shape[-1])

    def __deepcopy__(self, memo: dict[int, Any]) -> Csr:
        """Torch does not copy sparse matrices that way."""
        copied = Csr.__new__(Csr)
        copied.matrix = self.matrix.clone()
        return copied

    @property
    def nbytes(self) -> int:
        """See :attr:`Kernel.nbytes`."""
        parts = (self.matrix.values(), self.matrix.col_indices(), self.matrix.crow_indices())
        return sum(part.numel() * part.element_size() for part in parts)


class Lower(Kernel):
    """Another kernel on inputs and weights of a lower precision; the result is cast back."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, make: Callable[[Tensor], Kernel]) -> None:
        lower = weight.detach().to(dtype)
        self.kernel = make(lower)
        self.weight = lower if self.kernel.reads_weight else None
        self.dtype = dtype
        self.name = f"{self.kernel.name}:{str(dtype).removeprefix('torch.')}"

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See :meth:`Kernel.__call__`."""
        return self.kernel(x.to(self.dtype), self.weight, None if bias is None else bias.to(self.dtype)).to(x.dtype)

    @property
    def nbytes(self) -> int:
        """See :attr:`Kernel.nbytes`."""
        return self.kernel.nbytes + (0 if self.weight is None else self.weight.numel() * self.weight.element_size())


def sparsity_of(weight: Tensor) -> float:
    """The share of zeros in a weight."""
    return 1 - int(weight.count_nonzero()) / max(1, weight.numel())


def candidates(weight: Tensor, dtypes: Sequence[torch.dtype]) -> Iterator[tuple[str, Callable[[Tensor], Kernel]]]:
    """The kernels that may suit a weight: name, and a function that makes it for a weight.

    Args:
        weight: (out, in) on the CPU.
        dtypes: Precisions that are allowed besides the weight's own.
    """
    yield "dense", lambda _: Dense()
    if weight.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        yield "onednn", lambda _: OneDNN()
    sparse = sparsity_of(weight) >= _LEAST_SPARSITY
    compiled = sparse and weight.dtype in (torch.float32, torch.bfloat16) and kernel_problem() is None
    if compiled:
        for chunk in _chunks(weight):
            yield f"sparse:{chunk}", lambda w, chunk=chunk: Sparse(w, chunk)  # type: ignore[misc]
    if sparse and weight.dtype == torch.float32:
        yield "csr", Csr
    for dtype in dtypes:
        if dtype == weight.dtype:
            continue
        text = str(dtype).removeprefix("torch.")
        yield f"dense:{text}", lambda w, dtype=dtype: Lower(w, dtype, lambda _: Dense())  # type: ignore[misc]
        if compiled and dtype == torch.bfloat16:
            for chunk in _chunks(weight):
                yield (
                    f"sparse:{chunk}:{text}",
                    lambda w, dtype=dtype, chunk=chunk: Lower(w, dtype, lambda v: Sparse(v, chunk)),  # type: ignore[misc]
                )


def _chunks(weight: Tensor) -> list[int]:
    """Sizes of chunks that differ for a weight; the last one holds all of its inputs, if 16 bits can number them."""
    return [chunk for chunk in CHUNKS if chunk == WIDEST_CHUNK or chunk < weight.shape[1]]
