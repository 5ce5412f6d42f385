"""What options of ``hf-prune prune`` contradict one another."""

from __future__ import annotations

from hf_prune.errors import ConfigError
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.traits import can_shrink

SEARCHES = ("--max-drop", "--max-flips")
AMOUNTS = ("--sparsity", *SEARCHES, "--target-size", "--target-params", "--target-flops", "--target-speedup")


def refuse_contradictions(given: dict[str, bool]) -> None:
    """Refuse options that contradict one another: ``given`` says of each whether it is there."""
    amounts = [option for option in given if option in AMOUNTS and given[option]]
    search = next((option for option in SEARCHES if given[option]), None)
    if search is not None and (given["--dry-run"] or len(amounts) > 1):
        other = next((o for o in amounts if o != search), "--dry-run")
        raise ConfigError(f"{search} finds the sparsity by measuring, which contradicts {other}: leave one out")
    if len(amounts) > 1:
        raise ConfigError(f"{' and '.join(amounts)} each decide how much to remove: leave all but one out")
    for option in (*SEARCHES, "--plots", "--target-size"):
        if given["--stream"] and given[option]:
            raise ConfigError(f"--stream never holds the model, which {option} needs: leave one out")
    for option in (*SEARCHES, "--stream", "--dry-run"):
        if given["--polish-samples"] and given[option]:
            raise ConfigError(f"--polish-samples has no meaning with {option}: leave one out")


def check_shrink(config: PruningConfig, shrink: bool | None) -> None:
    """Refuse ``--shrink`` and ``--no-shrink`` where nothing can be cut out."""
    if shrink is not None and not can_shrink(config):
        raise ConfigError(
            f"--shrink and --no-shrink are for head, neuron, layer, row, column and channel, not for granularity "
            f"{config.granularity!r}: leave them out"
        )
