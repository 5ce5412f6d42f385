"""The workload that kernels are chosen and timed for: one forward pass on inputs that are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_prune.errors import ConfigError

WORKLOAD = {"batch_size": 1, "length": 128}  # by default
WITH_THREADS = (*WORKLOAD, "threads")


def check_workload(
    workload: object, keys: Sequence[str] = tuple(WORKLOAD), name: str = "workload", other: str = ""
) -> dict[str, int]:
    """The workload that an argument names; its defaults are not filled in.

    Args:
        workload: The argument.
        keys: What it may have.
        name: Of the argument, for the message.
        other: What it may be besides, for the message.

    Raises:
        ConfigError: If it is anything else.
    """
    values = dict(workload) if isinstance(workload, Mapping) else {"": 0}
    if all(key in keys and type(value) is int and value > 0 for key, value in values.items()):
        return values
    generates = values.keys() & {"prompt", "new_tokens"}
    hint = "; one forward pass is timed, and measure_latency(new_tokens=...) times generation" if generates else ""
    raise ConfigError(
        f"{name} is {workload!r:.200}: expected {other}whole numbers from 1 on of {', '.join(keys)}, "
        f"such as {WORKLOAD}{hint}"
    )
