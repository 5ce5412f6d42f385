"""hf-prune card: options, help, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_prune.cli.console import echo, show
from hf_prune.cli.model_options import CODE, UNSEEDED, loads_model
from hf_prune.cli.options import AsJson
from hf_prune.cli.startup import start


@loads_model(CODE, UNSEEDED)
def card(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder that prune or train wrote.", show_default=False)
    ],
    evaluation: Annotated[
        Path | None, typer.Option(help="What hf-prune evaluate DIR --against MODEL --json printed.")
    ] = None,
    latency: Annotated[Path | None, typer.Option(help="What hf-prune bench MODEL DIR --json printed.")] = None,
    acceleration: Annotated[
        Path | None, typer.Option(help="What hf-prune accelerate DIR --json printed: its time on sparse kernels.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the dense model; or its folder, from which only the license is taken.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id of the data set that it was scored on.")] = None,
    language: Annotated[
        str | None, typer.Option(help="What the model reads, by its code, such as en.", show_default=False)
    ] = None,
    example: Annotated[
        str | None,
        typer.Option(help="An input for the card's first code block, whose output is computed.", show_default=False),
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="Such as apache-2.0. [default: that of the base model's card]")
    ] = None,
    command: Annotated[str | None, typer.Option(help="The command that made the checkpoint, to show.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model. [default: the folder's name]")] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write README.md into the folder; what its author wrote stays.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a model card: zeros are counted, scores and timings read; missing facts are left out."""
    start([str(folder)])
    from hf_prune.auto import load_native
    from hf_prune.cli.workflows.example import example_of
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
        acceleration=acceleration,
        base_model=base_model,
        dataset=dataset,
        license=license_,
        command=command,
        language=language,
        example=None if example is None else example_of(str(folder), example),
        name=name,
    )
    old = folder / "README.md"
    text = render_card(data, read_card(old) if old.is_file() else None)  # raises before anything is written
    if write:
        write_json(folder / "sparsity_report.json", data.report)
        write_card(folder, data)
    if as_json:
        show({"card": text, "saved": str(old) if write else None}, as_json)
    else:
        echo(f"Saved in {old}." if write else text)
