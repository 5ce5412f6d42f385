"""How checkpoints are loaded: from which revision, in which dtype and on which device.

The command line says it once, for everything that a command loads; in Python, functions that load take arguments.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_prune.errors import ConfigError
from hf_prune.utils.registry import unknown_name

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadOptions:
    """How checkpoints are loaded.

    Args:
        model: The checkpoint that ``revision`` is of; others are loaded from their main branch.
        revision: Branch, tag or commit on the Hub.
        device: One of ``DEVICES``, or one with a number, such as ``"cuda:1"``; see :func:`resolve_device`.
        dtype: One of ``DTYPES``; ``"auto"`` for that of the checkpoint.
    """

    model: str = ""
    revision: str | None = None
    device: str = "cpu"
    dtype: str = "auto"

    def revision_of(self, source: str | os.PathLike[str]) -> str | None:
        """The revision to load a source from; None for its main branch."""
        return self.revision if os.fspath(source) == self.model else None

    def hub(self, source: str | os.PathLike[str]) -> dict[str, Any]:
        """Keyword arguments of functions that download files of a source."""
        revision = self.revision_of(source)
        return {} if revision is None else {"revision": revision}

    def loading(self, source: str | os.PathLike[str]) -> dict[str, Any]:
        """Keyword arguments of ``from_pretrained`` for a model."""
        return {**self.hub(source), **({} if self.dtype == "auto" else {"dtype": self.dtype})}


_OPTIONS: ContextVar[LoadOptions | None] = ContextVar("hf_prune_load_options", default=None)


def load_options() -> LoadOptions:
    """The options that hold here."""
    return _OPTIONS.get() or LoadOptions()


@contextlib.contextmanager
def loading_with(options: LoadOptions) -> Iterator[None]:
    """Load every checkpoint with these options, within this context.

    Raises:
        ConfigError: If the device or the dtype is unknown.
    """
    if options.dtype not in DTYPES:
        raise unknown_name("dtype", options.dtype, DTYPES)
    if options.device.partition(":")[0] not in DEVICES:
        raise unknown_name("device", options.device, DEVICES)
    token = _OPTIONS.set(options)
    try:
        yield
    finally:
        _OPTIONS.reset(token)


def resolve_device(name: str) -> torch.device:
    """The device that a name stands for.

    ``"auto"`` is the accelerator of this machine, CUDA, XPU or MPS, and the CPU where there is none, or where several
    processes run, which share the work on the CPU.

    Args:
        name: As of :class:`LoadOptions`.

    Raises:
        ConfigError: If this machine has no such device.
    """
    import torch

    if name == "auto":
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        found = torch.accelerator.current_accelerator(check_available=True) if alone else None
        return found if found is not None and found.type in DEVICES else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used: {reason}; choose auto for what is there") from error
    return device
