"""Compile the kernel at first use, once per machine and version of torch."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hf_prune.errors import CheckpointError, KernelError
from hf_prune.utils.locks import output_lock
from hf_prune.utils.output_folder import SAVE

_SOURCE = Path(__file__).with_name("sparse_linear.cpp")
_FLAGS = ("-O3", "-std=c++20", "-Wno-psabi")
_NAME = "hf_prune_sparse"
_WAIT = 600.0  # seconds for another process that is compiling


@functools.cache
def kernel_problem() -> str | None:
    """Why the kernel cannot be used here; None once it is loaded, which compiles it at first use.

    A failure is remembered: nothing is compiled a second time in one process.
    """
    try:
        load_kernel()
    except KernelError as error:
        return str(error)
    return None


@functools.cache
def load_kernel() -> None:
    """Compile the kernel if this machine has not done so yet, and register its operators.

    The library is kept in the folder of torch's extensions (``TORCH_EXTENSIONS_DIR``), under a name that tells the
    source, the version of torch and the processor; several processes wait for the one that compiles.

    Raises:
        KernelError: If there is no compiler, or it fails.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    folder = root / f"{_NAME}_{_fingerprint()}"
    library = folder / f"{_NAME}.so"
    if not library.is_file():
        try:
            with output_lock(folder, SAVE, wait=_WAIT):
                if not library.is_file():  # another process may have built it while this one waited
                    _compile(folder, library)
        except (OSError, CheckpointError) as error:
            raise KernelError(
                f"the sparse kernel cannot be kept in {root} ({error}): name another folder in TORCH_EXTENSIONS_DIR"
            ) from error
    try:
        if not hasattr(torch.ops.hf_prune, "sparse_linear"):  # which compiling it has loaded
            torch.ops.load_library(str(library))
    except OSError as error:
        raise KernelError(f"{library} cannot be loaded ({error}): delete its folder, to compile it again") from error
    torch.library.register_fake("hf_prune::sparse_linear", _fake)


def _fingerprint() -> str:
    parts = (_SOURCE.read_text(encoding="utf-8"), *_FLAGS, torch.__version__, platform.machine())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(folder: Path, library: Path) -> None:
    """Build the library beside its place, and move it there."""
    from torch.utils import cpp_extension

    work = folder.with_name(f"{folder.name}.{os.getpid()}")
    with _path_with_interpreter():
        compiler = cpp_extension.get_cxx_compiler()
        if shutil.which(compiler) is None:
            raise KernelError(
                f"the sparse kernel is compiled at first use, and the C++ compiler {compiler} was not found: install "
                f"one (g++ or clang++), or name it in the environment variable CXX"
            )
        if not cpp_extension.is_ninja_available():
            raise KernelError("the sparse kernel is compiled with ninja, which is not installed: pip install ninja")
        print(f"Compiling the sparse kernel, once (about half a minute) -> {folder}", file=sys.stderr, flush=True)
        try:
            work.mkdir(parents=True)
            cpp_extension.load(
                _NAME,
                [str(_SOURCE)],
                extra_cflags=list(_FLAGS),
                build_directory=str(work),
                is_python_module=False,
            )
            folder.mkdir(parents=True, exist_ok=True)
            os.replace(work / library.name, library)
        except (RuntimeError, OSError, ImportError) as error:
            lines = str(error).splitlines() or [type(error).__name__]
            reason = next((line for line in lines if "error:" in line), lines[0])
            raise KernelError(
                f"the sparse kernel could not be compiled with {compiler} ({reason}): expected g++ 12 or clang++ 15, "
                f"or newer"
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _path_with_interpreter() -> Iterator[None]:
    """Find ``ninja`` beside a Python that was started without activating its environment."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _fake(
    x: torch.Tensor,
    values: torch.Tensor,
    columns: torch.Tensor,
    starts: torch.Tensor,
    bias: torch.Tensor | None,
    outputs: int,
    inputs: int,
    chunk: int,
    level: str,
) -> torch.Tensor:
    """The shape of a product, for torch.compile and torch.export."""
    return x.new_empty((*x.shape[:-1], outputs))
