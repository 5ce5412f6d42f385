"""Write a checkpoint's config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the ``config.json`` of a checkpoint that is being made."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
