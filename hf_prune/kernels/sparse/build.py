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
from typing import Any

import torch
from torch._appdirs import user_cache_dir

from hf_prune.errors import CheckpointError, KernelError
from hf_prune.utils.locks import output_lock
from hf_prune.utils.output_folder import SAVE

_SOURCE = Path(__file__).with_name("operators.cpp")
_FLAGS = ("-O3", "-std=c++20", "-Wno-psabi")
_NAME = "hf_prune_sparse"
_PRODUCTS = ("sparse_linear", "sliced_linear", "bits_linear", "blocks_linear")
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
    library = _library()
    folder, root = library.parent, library.parent.parent
    if not library.is_file():
        try:
            with output_lock(folder, SAVE, wait=_WAIT):
                if not library.is_file():  # another process may have built it while this one waited
                    _compile(folder, library)
        except (OSError, CheckpointError) as error:
            raise KernelError(
                f"the sparse kernel cannot be kept in {root} ({error}): name another folder in TORCH_EXTENSIONS_DIR"
            ) from error
    _load(library)


@functools.cache
def load_if_compiled() -> None:
    """Load the kernel if an earlier use has compiled it; otherwise, do nothing.

    Raises:
        KernelError: If it cannot be loaded.
    """
    if (library := _library()).is_file():
        _load(library)


@functools.cache
def _load(library: Path) -> None:
    try:
        if not hasattr(torch.ops.hf_prune, "sparse_linear"):  # which compiling it has loaded
            torch.ops.load_library(str(library))
    except OSError as error:
        raise KernelError(f"{library} cannot be loaded ({error}): delete its folder, to compile it again") from error
    for name in _PRODUCTS:
        torch.library.register_fake(f"hf_prune::{name}", _fake)


def _library() -> Path:
    """Where the library is, or would be: in the folder of torch's extensions, which takes long to ask torch for."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.realpath(user_cache_dir(appname="torch_extensions"))
    return Path(root) / f"{_NAME}_{_fingerprint()}" / f"{_NAME}.so"


def _fingerprint() -> str:
    headers = sorted(_SOURCE.parent.glob("*.h"))
    code = [path.read_text(encoding="utf-8") for path in (_SOURCE, *headers)]
    parts = (*code, *_FLAGS, torch.__version__, platform.machine())
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


def _fake(x: torch.Tensor, *args: Any) -> torch.Tensor:
    """The shape of a product, for torch.compile and torch.export: their number is the first of the numbers."""
    outputs = next(arg for arg in args if isinstance(arg, int))
    return x.new_empty((*x.shape[:-1], outputs))
