"""hf-prune card: options, help, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.console import echo
from hf_prune.cli.startup import start


def card(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that prune or train wrote.", show_default=False)
    ],
    evaluation: Annotated[
        Path | None, typer.Option(help="What hf-prune evaluate DIR --against MODEL --json printed.")
    ] = None,
    latency: Annotated[Path | None, typer.Option(help="What hf-prune bench MODEL DIR --json printed.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the dense model; or its folder, from which only the license is taken.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id of the data set that it was scored on.")] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="Such as apache-2.0. [default: that of the base model's card]")
    ] = None,
    command: Annotated[str | None, typer.Option(help="The command that made the checkpoint, to show.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model. [default: the folder's name]")] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write README.md into the folder; what its author wrote stays.")
    ] = False,
) -> None:
    """Make a model card: zeros are counted, scores and timings read; missing facts are left out."""
    start([str(folder)])
    from hf_prune.auto import load_native
    from hf_prune.hub.card import render_card, write_card
    from hf_prune.hub.card_data import read_card_data
    from hf_prune.hub.describe import full_report
    from hf_prune.utils.files import write_json
    from hf_prune.utils.front_matter import read_card

    report = full_report(load_native(str(folder))).to_dict()
    data = read_card_data(
        folder,
        report=report,
        evaluation=evaluation,
        latency=latency,
        base_model=base_model,
        dataset=dataset,
        license=license_,
        command=command,
        name=name,
    )
    old = folder / "README.md"
    text = render_card(data, read_card(old) if old.is_file() else None)  # raises before anything is written
    if write:
        write_json(folder / "sparsity_report.json", data.report)
        write_card(folder, data)
        echo(f"Saved in {folder / 'README.md'}.")
        return
    echo(text)
