"""Sparse ways to compute a linear layer: the formats of our own kernel, and torch's CSR matrices."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_prune.inference.acceleration.kernel import Kernel
from hf_prune.kernels.sparse.bit_rows import BitRows
from hf_prune.kernels.sparse.build import load_kernel
from hf_prune.kernels.sparse.row_blocks import MOST_INPUTS as MOST_BLOCK_INPUTS
from hf_prune.kernels.sparse.row_blocks import RowBlocks, in_blocks
from hf_prune.kernels.sparse.slices import MOST_INPUTS as MOST_SLICED_INPUTS
from hf_prune.kernels.sparse.slices import SlicedRows
from hf_prune.kernels.sparse.sparse_rows import WIDEST_CHUNK, SparseRows

CHUNKS = (192, 384, WIDEST_CHUNK)  # inputs of a chunk that are tried: for 64 tokens, for 32, and for few
_MOST_FILLED = 2  # values of blocks for each one that is not zero; with more, single values are faster


class Sparse(Kernel):
    """A format of the sparse kernel of hf_prune.

    Args:
        weight: (out, in).
        name: ``"sparse:N"``, rows in chunks of N inputs; ``"sliced"`` and ``"bits"``, for few tokens; or ``"blocks"``.
    """

    def __init__(self, weight: Tensor, name: str) -> None:
        load_kernel()
        self.name = name
        self.rows = (
            SparseRows.from_dense(weight, int(name.partition(":")[2]))
            if name.startswith("sparse:")
            else {"sliced": SlicedRows, "bits": BitRows, "blocks": RowBlocks}[name].from_dense(weight)  # type: ignore[attr-defined]
        )

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See :meth:`Kernel.__call__`."""
        product: Tensor = self.rows.linear(x, bias)
        return product

    def to_dense(self) -> Tensor:
        """See :meth:`Kernel.to_dense`."""
        weight: Tensor = self.rows.to_dense()
        return weight

    @property
    def nbytes(self) -> int:
        """See :attr:`Kernel.nbytes`."""
        nbytes: int = self.rows.nbytes
        return nbytes

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled in a process that may not have loaded the kernel."""
        load_kernel()
        self.__dict__.update(state)


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


def formats_for(weight: Tensor) -> list[str]:
    """The names of the formats that may suit a weight, for :class:`Sparse`."""
    inputs = weight.shape[1]
    names = [f"sparse:{chunk}" for chunk in CHUNKS if chunk == WIDEST_CHUNK or chunk < inputs]
    if inputs <= MOST_SLICED_INPUTS:
        names.append("sliced")
    return [*names, "bits", *(["blocks"] if in_few_blocks(weight) else [])]


def in_few_blocks(weight: Tensor) -> bool:
    """Whether blocks of 16 rows of a column hold the weights that are not zero, and few others."""
    kept = int(weight.count_nonzero())
    if weight.shape[1] > MOST_BLOCK_INPUTS or kept == weight.numel():
        return False
    return 16 * int(in_blocks(weight.detach()).ne(0).any(1).sum()) <= _MOST_FILLED * kept
