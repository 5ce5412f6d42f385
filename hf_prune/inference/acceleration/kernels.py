"""The ways to compute one linear layer that compete with one another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_prune.errors import KernelError
from hf_prune.kernels.sparse.build import kernel_problem, load_kernel
from hf_prune.kernels.sparse.sparse_rows import WIDEST_CHUNK, SparseRows

CHUNKS = (192, 384, WIDEST_CHUNK)  # inputs of a chunk that are tried: for 64 tokens, for 32, and for few
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of weights, and of computations that may be allowed
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

    def __init__(self, weight: Tensor, dtype: torch.dtype, name: str) -> None:
        lower = weight.detach().to(dtype)
        self.kernel = make_kernel(name, lower)
        self.weight = lower if self.kernel.reads_weight else None
        self.dtype = dtype
        self.name = f"{name}:{_text(dtype)}"

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


def candidates(weight: Tensor, dtypes: Sequence[torch.dtype]) -> list[str]:
    """The names of the kernels that may suit a weight, for :func:`make_kernel`.

    Args:
        weight: (out, in) on the CPU.
        dtypes: Precisions that are allowed besides the weight's own.
    """
    single = weight.dtype == torch.float32
    sparse = sparsity_of(weight) >= _LEAST_SPARSITY
    compiled = sparse and weight.dtype in DTYPES.values() and kernel_problem() is None
    layouts = [f"sparse:{chunk}" for chunk in _chunks(weight)] if compiled else []
    names = [
        "dense",
        *(["onednn"] if single and torch.backends.mkldnn.is_available() else []),
        *layouts,
        *(["csr"] if sparse and single else []),
    ]
    for dtype in dtypes:
        if dtype != weight.dtype:
            names += [f"{name}:{_text(dtype)}" for name in ("dense", *layouts)]
    return names


def make_kernel(name: str, weight: Tensor) -> Kernel:
    """The kernel with a name, such as ``"sparse:384"`` or ``"dense:bfloat16"``, for a weight.

    Args:
        name: One that :func:`candidates` gives, for this weight or for another.
        weight: (out, in) on the CPU.

    Raises:
        KernelError: If there is no such kernel, or not on this machine.
    """
    kind, _, detail = name.partition(":")
    chunk, _, lower = detail.partition(":") if kind == "sparse" else ("", "", detail)
    if lower in DTYPES:
        return Lower(weight, DTYPES[lower], name.removesuffix(f":{lower}"))
    if name == f"sparse:{chunk}" and chunk.isdigit() and 1 <= int(chunk) <= WIDEST_CHUNK:
        return Sparse(weight, int(chunk))
    if name == "onednn" and not torch.backends.mkldnn.is_available():
        raise KernelError("torch has no oneDNN here, which the kernel 'onednn' is: choose anew")
    if name in _PLAIN:
        return _PLAIN[name](weight)
    raise KernelError(f"there is no kernel {name!r}: choose anew")


_PLAIN: dict[str, Callable[[Tensor], Kernel]] = {
    "dense": lambda _: Dense(),
    "onednn": lambda _: OneDNN(),
    "csr": Csr,
}


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _chunks(weight: Tensor) -> list[int]:
    """Sizes of chunks that differ for a weight; the last one holds all of its inputs, if 16 bits can number them."""
    return [chunk for chunk in CHUNKS if chunk == WIDEST_CHUNK or chunk < weight.shape[1]]
