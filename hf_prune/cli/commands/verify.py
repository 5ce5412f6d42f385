"""hf-prune verify: options, help, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_prune.cli.console import echo
from hf_prune.cli.model_options import loads_model
from hf_prune.cli.options import USEFUL, AnyText, AsJson, Data, Label, read_task, task_kind
from hf_prune.cli.startup import check_data, start
from hf_prune.errors import ConfigError
from hf_prune.evaluation.tasks import LanguageModelingTask


@loads_model()
def verify(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Revision of the repository.")] = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate", help="Also score it again, on --data: on its first examples, as many as the card says."
        ),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(help="With --evaluate: the dense model, to measure again how far the predictions are from its."),
    ] = None,
    data: Data = None,
    text_column: AnyText = None,
    label_column: Label = None,
    split: Annotated[str | None, typer.Option(help="[default: the one that the card names]")] = None,
    as_json: AsJson = False,
) -> None:
    """Recount everything that a model card claims; exit code 1 if anything differs."""
    start([source])
    if against is not None and not evaluate:
        raise ConfigError("--against is the dense model that --evaluate compares with: add --evaluate, or leave it out")
    from hf_prune.hub.verify import verify_checkpoint

    scored: dict[str, Any] = {}

    def score(folder: str) -> dict[str, Any]:
        from hf_prune.cli.workflows.evaluate import (
            evaluate_checkpoint,
            measure_again,
            measure_held_out_texts,
            score_held_out,
        )
        from hf_prune.evaluation.sentence_result import METRICS, NDCG
        from hf_prune.hub.card_metadata import read_facts
        from hf_prune.utils.front_matter import read_card

        claimed = read_facts(read_card(Path(folder) / "README.md"))["score"]
        ranked = (option for option, name in METRICS.items() if name == claimed.get("metric"))
        metric = claimed.get("name") or next(ranked, None)
        kind = task_kind(folder, metric)
        source = check_data(data or claimed.get("dataset"), labelled=False, why="--evaluate", useful=USEFUL[kind])
        calibrated = {"calibration_split": claimed["split"]} if claimed.get("held_out") and claimed.get("split") else {}
        is_another = split not in (None, claimed.get("split"))
        rows = claimed.get("n_rows", None if claimed.get("metric") == NDCG else claimed.get("n"))  # n counts queries
        first = None if is_another else rows
        task: Any = read_task(kind, source, text_column, label_column, metric=metric, limit=first, **calibrated)
        assert task is not None
        part = split or claimed.get("split") or task.default_split
        held_out = bool(claimed.get("held_out"))
        if held_out and split is not None:
            raise ConfigError(
                f"--split {split}: the score of this card is of data that was held out, as it is again: leave --split "
                f"out"
            )
        if isinstance(task, LanguageModelingTask):
            if against is not None:
                raise ConfigError(
                    "--against measures how far predictions are apart, which cards of language models leave out"
                )
            if held_out:
                return measure_held_out_texts(folder, task, claimed)
            return measure_again(folder, task, part, claimed)

        def score_of(model: str) -> Any:
            return score_held_out(model, task, claimed) if held_out else evaluate_checkpoint(model, task, part)

        score = score_of(folder)
        scored["compare"] = lambda: task.compare(score_of(str(against)), score)
        values: dict[str, Any] = score.to_dict()
        return values

    def divergence(folder: str) -> dict[str, Any] | None:
        moved = scored["compare"]().divergence
        return None if moved is None else moved.to_dict()

    result = verify_checkpoint(
        source,
        revision=revision,
        score=score if evaluate else None,
        divergence=None if against is None else divergence,
    )
    echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
    if not result.is_right:
        raise typer.Exit(1)
