"""hf-prune card and hf-prune verify: what is said of a checkpoint, and whether it is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.checkpoint.sources import is_language_model, model_class
from hf_prune.cli.options import SST2, WIKITEXT, AnyData, AnyText, AsJson, Label, echo, read_task, start

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that prune or train wrote.", show_default=False)]


def card(
    folder: Folder,
    evaluation: Annotated[
        Path | None, typer.Option(help="What hf-prune evaluate DIR --against MODEL --json printed.")
    ] = None,
    latency: Annotated[Path | None, typer.Option(help="What hf-prune bench MODEL DIR --json printed.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the dense model; or its folder, of which only the license is taken.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub id of the data that it was scored on.")] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="Such as apache-2.0. [default: that of the base model's card]")
    ] = None,
    command: Annotated[str | None, typer.Option(help="What made the checkpoint, to be shown.")] = None,
    name: Annotated[str | None, typer.Option(help="What to call the model. [default: the folder's name]")] = None,
    write: Annotated[
        bool, typer.Option("--write", help="Write README.md into the folder; what its author wrote stays.")
    ] = False,
) -> None:
    """Make a model card: zeros are counted, scores and timings read; facts that are missing are left out."""
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
    text = render_card(data, read_card(old) if old.is_file() else None)  # errors come before anything is written
    if write:
        write_json(folder / "sparsity_report.json", data.report)
        write_card(folder, data)
        echo(f"Saved in {folder / 'README.md'}.")
        return
    echo(text)


def verify(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Of the repository.")] = None,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Also score it again, on --data.")] = False,
    data: AnyData = None,
    text_column: AnyText = None,
    label_column: Label = "label",
    split: Annotated[str | None, typer.Option(help="[default: the one that the card names]")] = None,
    as_json: AsJson = False,
) -> None:
    """Count everything again that a model card says; exit code 1 if anything differs."""
    start([source])
    from hf_prune.hub.verify import verify_checkpoint

    def score(folder: str) -> dict[str, Any]:
        from hf_prune.cli.workflows.evaluate import evaluate_checkpoint
        from hf_prune.hub.card_metadata import read_facts
        from hf_prune.utils.front_matter import read_card

        said = read_facts(read_card(Path(folder) / "README.md"))["score"]
        of_language = is_language_model(model_class(folder))
        source = data or said.get("dataset") or (WIKITEXT if of_language else SST2)
        task = read_task(of_language, source, text_column, label_column)
        options = {"window": said.get("window"), "limit": said.get("n")} if of_language else {}
        return evaluate_checkpoint(folder, task, split or said.get("split") or task.default_split, **options).to_dict()

    result = verify_checkpoint(source, revision=revision, score=score if evaluate else None)
    echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
    if not result.is_right:
        raise typer.Exit(1)
