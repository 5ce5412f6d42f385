"""hf-prune push: options, help, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_prune.checkpoint.sources import check_unquantized
from hf_prune.cli.console import echo
from hf_prune.cli.model_options import LOCAL, UNSEEDED, loads_model
from hf_prune.cli.options import AsJson


@loads_model(LOCAL, UNSEEDED)
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with a checkpoint.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="owner/name, or a name of your own.", show_default=False)],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="For a new repository. [default: that of your account]"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, created if needed. [default: main]")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also overwrite a repository that holds something else.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Upload nothing: list the files, and show the card.")
    ] = False,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload pruned model",
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint to the Hub, in one commit, with a card if hf-prune made the folder."""
    from hf_prune.hub.client import check_repo_id

    check_repo_id(repo)
    if (folder / "config.json").is_file():  # what is missing is said below
        check_unquantized(folder)
    from hf_prune.hub.folder_facts import has_report
    from hf_prune.hub.push import push_checkpoint

    card = None
    if has_report(folder) and not (folder / "README.md").is_file():
        from hf_prune.auto import load_native
        from hf_prune.hub.card_data import read_card_data
        from hf_prune.hub.describe import full_report

        card = read_card_data(folder, report=full_report(load_native(str(folder))).to_dict(), name=repo)
    result = push_checkpoint(
        folder,
        repo,
        private=private,
        revision=revision,
        create_pr=create_pr,
        force=force,
        dry_run=dry_run,
        commit_message=message,
        card=card,
    )
    echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
