"""The ways to compute one linear layer that compete with one another: which suit a weight, and each by its name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_prune.errors import KernelError
from hf_prune.inference.acceleration.dense_kernels import Compact, Dense, Int8, OneDNN, onednn_agrees
from hf_prune.inference.acceleration.kernel import Kernel
from hf_prune.inference.acceleration.sparse_kernels import Csr, Sparse, formats_for, in_few_blocks
from hf_prune.kernels.sparse.build import kernel_problem
from hf_prune.kernels.sparse.sparse_rows import WIDEST_CHUNK

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of weights
PRECISIONS = (*DTYPES, "int8")  # of computations that may be allowed
SPARSITY_STEPS = 20  # shares of zeros are rounded to 1 / 20
LEAST_SPARSITY = 0.3  # below it no sparse kernel has ever been the fastest


class Lower(Kernel):
    """Another kernel on inputs and weights of a lower precision; the result is cast back."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, name: str) -> None:
        lower = weight.detach().to(dtype)
        self.kernel = make_kernel(name, lower)
        self.weight = lower if self.kernel.reads_weight else None
        self.dtype = dtype
        self.name = f"{name}:{name_of(dtype)}"

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


def stepped_sparsity_of(weight: Tensor) -> float:
    """The share of zeros in a weight, rounded to 5 %."""
    return round(SPARSITY_STEPS * sparsity_of(weight)) / SPARSITY_STEPS


def zeros_of(weight: Tensor) -> tuple[bool, bool]:
    """Whether the zeros of a weight fill rows or columns, and blocks: other kernels suit it then than another one."""
    return Compact.suits(weight), in_few_blocks(weight)


def candidates(weight: Tensor, precisions: Sequence[str]) -> list[str]:
    """The names of the kernels that may suit a weight, for :func:`make_kernel`.

    Args:
        weight: (out, in) on the CPU.
        precisions: Of :data:`PRECISIONS`, those that are allowed besides the weight's own.
    """
    single = weight.dtype == torch.float32
    sparse = sparsity_of(weight) >= LEAST_SPARSITY
    layouts = formats_for(weight) if sparse and weight.dtype in DTYPES.values() and kernel_problem() is None else []
    dense = ["dense", *(["onednn"] if single and onednn_agrees() else [])]
    names = [
        *dense,
        *([f"compact:{name}" for name in dense] if sparse and Compact.suits(weight) else []),
        *layouts,
        *(["csr"] if sparse and single else []),
    ]
    for precision in precisions:
        if precision == "int8":
            names.append("dense:int8")
        elif DTYPES[precision] != weight.dtype:
            names += [f"{name}:{precision}" for name in ("dense", *layouts)]
    return names


def make_kernel(name: str, weight: Tensor) -> Kernel:
    """The kernel with a name, such as ``"sparse:384"`` or ``"dense:bfloat16"``, for a weight.

    Args:
        name: One that :func:`candidates` gives, for this weight or for another.
        weight: (out, in) on the CPU.

    Raises:
        KernelError: If there is no such kernel, or not on this machine.
    """
    if not is_kernel(name, name_of(weight.dtype)):
        raise KernelError(f"there is no kernel {name!r} for {name_of(weight.dtype)}: choose anew")
    rest, _, last = name.rpartition(":")
    if rest and last in DTYPES:
        return Lower(weight, DTYPES[last], rest)
    if name in ("onednn", "compact:onednn") and not onednn_agrees():
        raise KernelError(f"torch has no exact oneDNN here, which the kernel {name!r} needs: choose anew")
    dense = {"dense": Dense, "onednn": OneDNN}
    if name in dense:
        return dense[name]()
    if rest == "compact":
        return Compact(weight, dense[last]())
    if name == "dense:int8":
        return Int8(weight)
    if name == "csr":
        return Csr(weight)
    return Sparse(weight, name)


def is_kernel(name: str, dtype: str) -> bool:
    """Whether :func:`candidates` may give a name for some weight of a dtype, such as ``"float32"``."""
    rest, _, last = name.rpartition(":")
    if rest and last in DTYPES:
        return last != dtype and (rest == "dense" or _is_format(rest))
    if name in ("onednn", "compact:onednn", "csr"):
        return dtype == "float32"
    return name in ("dense", "compact:dense", "dense:int8") or _is_format(name)


def _is_format(name: str) -> bool:
    first, _, chunk = name.partition(":")
    if first == "sparse" and chunk.isascii() and chunk.isdecimal():
        return len(chunk) < 9 and 1 <= int(chunk) <= WIDEST_CHUNK
    return name in ("sliced", "bits", "blocks")


def precision_of(name: str) -> str | None:
    """The precision that the name of a kernel ends with, if it is one besides the weight's own."""
    last = name.rpartition(":")[2]
    return last if last in PRECISIONS else None


def name_of(dtype: torch.dtype) -> str:
    """Such as ``"float32"``."""
    return str(dtype).removeprefix("torch.")
