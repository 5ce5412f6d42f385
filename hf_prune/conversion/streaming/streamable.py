"""Which settings can be streamed: those that never need the whole model at once."""

from __future__ import annotations

from hf_prune.criteria.base import INPUTS
from hf_prune.errors import ConfigError
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.traits import removed_kinds
from hf_prune.utils.distributed import rank_and_world_size

_KINDS = ("expert", "head", "layer", "neuron")  # of units that go without the whole model
_UNIT_CRITERIA = ("fisher", "frequency", "greedy", "magnitude", "random", "reap", "reconstruction", "taylor")
_ONE_PASS = (
    "calibration_order={!r} needs the statistics of all weights at once: expected 'sequential'; or prune without "
    "streaming"
)


def check_streamable(config: PruningConfig) -> None:
    """Make sure that the settings do not need the whole model in memory.

    Raises:
        ConfigError: If they do.
    """
    if config.learns_in_training or config.schedule is not None:
        raise ConfigError(
            f"criterion {config.criterion!r} and schedule={config.schedule!r}: streaming does not train; expected "
            f"another criterion and no schedule"
        )
    if config.removes_units:
        _check_units(config)
    else:
        _check_weights(config)
    if (count := rank_and_world_size()[1]) > 1:
        raise ConfigError(f"found {count} processes: expected one, since streaming writes one output")


def _check_units(config: PruningConfig) -> None:
    """Refuse kinds of units that need more than one layer at a time, and what has to run the model as a whole."""
    if not set(removed_kinds(config)) <= set(_KINDS):
        raise ConfigError(
            f"granularity {config.granularity} needs the whole model in memory: expected 'expert', 'head', "
            f"'layer', 'neuron', 'unstructured', N:M or 'block:RxC', or prune without streaming"
        )
    if config.criterion not in _UNIT_CRITERIA:
        raise ConfigError(
            f"criterion {config.criterion!r} ranks {'s and '.join(removed_kinds(config))}s with the whole model in "
            f"memory: expected one of {', '.join(_UNIT_CRITERIA)}; or prune without streaming"
        )
    if config.repair is not None and config.calibration_order != "sequential":
        raise ConfigError(_ONE_PASS.format(config.calibration_order))
    for name in ("target_flops", "target_speedup", "polish"):
        if (value := getattr(config, name)) is not None:
            raise ConfigError(
                f"{name}={value!r} runs the whole model, which streaming never holds: leave it out, and give sparsity "
                f"or target_params, or prune without streaming"
            )


def _check_weights(config: PruningConfig) -> None:
    """Refuse what trains, gradients of a pruned model, and statistics or masks of all weights at once."""
    if config.polish is not None:
        raise ConfigError(
            "a polish trains the whole model, which streaming never holds: leave it out, or prune without streaming"
        )
    if config.steps > 1:
        raise ConfigError(
            f"steps={config.steps} takes gradients of a model that is pruned already: streaming takes those of the "
            f"dense one; expected 1, or prune without streaming"
        )
    if config.repair is not None and config.scope == "global":
        raise ConfigError(
            f"repair={config.repair!r} with scope='global' needs all masks before the first repair: use scope 'layer' "
            f"or 'row', or prune without streaming"
        )
    if config.needs & INPUTS and config.calibration_order != "sequential":
        raise ConfigError(_ONE_PASS.format(config.calibration_order))
