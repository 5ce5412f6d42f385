"""The card that a command writes beside the checkpoint that it made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from hf_prune.errors import HfPruneError
from hf_prune.hub.card import write_card
from hf_prune.hub.card_data import read_card_data
from hf_prune.hub.describe import calibration_of
from hf_prune.planning.config import PruningConfig
from hf_prune.utils.folders import refuse_links
from hf_prune.utils.notices import warn_user


def write_run_card(
    staging: Path,
    out: Path,
    source: str,
    config: PruningConfig | None,
    task: Any,
    *,
    command: str | None = None,
    **measured: Any,
) -> None:
    """Write ``README.md`` and its facts beside a new checkpoint; what was not measured is not in it.

    The text that an author wrote into the card before it is kept. Where a card cannot be written, the checkpoint is
    saved without one, and a warning says why.

    Args:
        staging: The checkpoint with its reports, still in the making or in its place.
        out: The folder that it becomes, or is.
        source: The dense model.
        config: The settings.
        task: The data that it learned from; None if there is none.
        command: The command line that made it.
        **measured: ``evaluation``, as for :func:`hf_prune.read_card_data`.
    """
    card = staging / "README.md"
    facts = {"base_model": source, "command": command, "calibration": calibration_of(config, task), **measured}
    is_placed = staging == out
    try:
        refuse_links(out, [card.name])
        if not is_placed and (out / card.name).is_file():
            shutil.copyfile(out / card.name, card)
        data = read_card_data(staging, name=out.resolve().name, **{k: v for k, v in facts.items() if v is not None})
        write_card(staging, data)
    except (HfPruneError, OSError) as error:
        if not is_placed:
            card.unlink(missing_ok=True)
        why = str(error).replace(str(staging.resolve()), str(out)).replace(str(staging), str(out))
        warn_user(f"no card was written ({why}): hf-prune card {out} --write writes one")
