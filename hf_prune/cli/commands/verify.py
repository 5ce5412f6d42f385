"""hf-prune verify: options, help, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.cli.console import echo
from hf_prune.cli.options import LANGUAGE, AnyData, AnyText, AsJson, Label, read_task, task_kind
from hf_prune.cli.startup import start


def verify(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Revision of the repository.")] = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Also score it again, on --data.")] = False,
    data: AnyData = None,
    text_column: AnyText = None,
    label_column: Label = "label",
    split: Annotated[str | None, typer.Option(help="[default: the one that the card names]")] = None,
    as_json: AsJson = False,
) -> None:
    """Recount everything that a model card claims; exit code 1 if anything differs."""
    start([source])
    from hf_prune.hub.verify import verify_checkpoint

    def score(folder: str) -> dict[str, Any]:
        from hf_prune.cli.workflows.evaluate import evaluate_checkpoint
        from hf_prune.hub.card_metadata import read_facts
        from hf_prune.utils.front_matter import read_card

        claimed = read_facts(read_card(Path(folder) / "README.md"))["score"]
        kind = task_kind(folder)
        task = read_task(kind, data or claimed.get("dataset"), text_column, label_column)
        options = {"window": claimed.get("window"), "limit": claimed.get("n")} if kind == LANGUAGE else {}
        return evaluate_checkpoint(
            folder, task, split or claimed.get("split") or task.default_split, **options
        ).to_dict()

    result = verify_checkpoint(source, revision=revision, score=score if evaluate else None)
    echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
    if not result.is_right:
        raise typer.Exit(1)
