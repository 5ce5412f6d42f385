"""Prune a checkpoint as far as an accepted loss allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_prune.calibration.texts import joined_tokens
from hf_prune.cli.workflows.card import write_run_card
from hf_prune.cli.workflows.loading import join_processes, load_for_task
from hf_prune.cli.workflows.prune import pruned_into
from hf_prune.evaluation.accuracy import evaluate_classification
from hf_prune.evaluation.accuracy_result import Evaluation
from hf_prune.evaluation.allowed_loss import check_budget
from hf_prune.evaluation.comparison import Comparison
from hf_prune.evaluation.data.checks import check_columns, rows_named
from hf_prune.evaluation.data.classification import class_numbers
from hf_prune.evaluation.data.files import refuse_same_split
from hf_prune.evaluation.perplexity_result import PerplexityComparison
from hf_prune.evaluation.sparsity_report import SparsityReport
from hf_prune.evaluation.sparsity_search import SparsitySearch, find_sparsity
from hf_prune.evaluation.tasks import ClassificationTask, LanguageModelingTask
from hf_prune.hub.checksums import measured_weights
from hf_prune.planning.config import PruningConfig
from hf_prune.utils.distributed import is_main_process
from hf_prune.utils.files import write_json
from hf_prune.utils.formatting import display_name
from hf_prune.utils.locks import writes_alone
from hf_prune.utils.notices import reported
from hf_prune.utils.output_folder import check_output


@writes_alone("prune")
@reported()
def prune_to_budget(
    source: str,
    config: PruningConfig,
    out: Path,
    task: ClassificationTask | LanguageModelingTask,
    *,
    max_drop: float | None = None,
    max_flips: float | None = None,
    held_out: int = 2000,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    plots: bool = False,
    name: str = "",
    overwrite: bool = False,
    command: str | None = None,
) -> tuple[SparsitySearch, Comparison | PerplexityComparison, SparsityReport]:
    """Prune a checkpoint as far as an accepted loss allows, and save it as :func:`prune_checkpoint` does.

    The sparsity is found on sentences of the calibration split that neither calibration nor a polish sees, or for
    language models on its last quarter; see :func:`hf_prune.find_sparsity`. A polish trains on up to 4,096 others,
    without their labels. The score on the other split is only reported.

    Args:
        source: Folder or Hub id of a dense sequence classifier or causal language model.
        config: All settings but the sparsity.
        out: The folder: new, empty, or an earlier output.
        task: Labelled texts, or texts for a language model.
        max_drop: Largest accepted loss, in points of accuracy, or per cent of perplexity.
        max_flips: Instead, for classifiers: the largest share of answers that may change, in percent.
        held_out: The most sentences, or windows, that the search scores.
        split: The split whose score is reported; by default the one that such tasks are scored on.
        limit: Score only this many sentences, or windows, of that split, the first ones; None for all.
        batch_size: Examples scored at once.
        plots: Also write ``weights.png`` and ``layers.png``.
        name: Name of the model in plots.
        overwrite: Replace what is in the way in ``out``.
        command: The command line, for the card.

    Returns:
        The search and the comparison on ``split``, also written to ``sparsity_search.json``, and the report.

    Raises:
        BudgetError: If no sparsity is within the budget; then nothing is written.
        CheckpointError: If ``out`` is the source, or something is in the way.
    """
    check_output(out, "prune", [source], overwrite=overwrite)
    check_budget(config, max_drop, max_flips)
    split = split or task.default_split
    why = "a model looks better than it is on the sentences that its sparsity was chosen on"
    refuse_same_split(task.source, split, task.calibration_split, "searched and reported on", why)
    join_processes()
    model, tokenizer = load_for_task(source, task)
    data = (
        _windows_to_search(task, model, tokenizer, config, held_out, split, limit)
        if isinstance(task, LanguageModelingTask)
        else _sentences_to_search(
            dataclasses.replace(task, limit=limit), model, tokenizer, config, held_out, split, batch_size
        )
    )
    search = find_sparsity(
        model,
        tokenizer,
        data.held_out,
        max_drop=max_drop,
        max_flips=max_flips,
        config=config,
        calibration=data.calibration,
        polish_data=data.polish_data,
        progress=is_main_process(),
        split=task.calibration_split,
        source=display_name(task.source),
        batch_size=batch_size,
        **data.options,
    )
    dense = data.score(f"dense, {split}")
    pruned = pruned_into(
        out,
        model,
        search.config,
        data.calibration,
        data.polish_data,
        source=source,
        plots=plots,
        name=name,
        overwrite=overwrite,
    )
    with pruned as (report, staging):
        comparison: Any = task.compare(dense, final := data.score(f"pruned, {split}"))
        if staging is not None:
            values = {**search.to_dict(), "reported": {"split": split, **comparison.to_dict()}}
            write_json(staging / "sparsity_search.json", values)
            scores = {"evaluation": final, "dense": dense, "comparison": comparison}
            evaluation = {"weights": measured_weights(str(staging)), **{k: v.to_dict() for k, v in scores.items()}}
            write_run_card(staging, out, source, search.config, task, command=command, evaluation=evaluation)
    return search, comparison, report


@dataclasses.dataclass(frozen=True)
class _SearchData:
    """What a search scores and learns from.

    Args:
        held_out: What it scores.
        calibration: Batches that it calibrates on.
        polish_data: Batches for a polish, if others.
        options: How ``held_out`` is scored.
        score: Scores the model on the split that is only reported, with a title for the progress bar.
    """

    held_out: Any
    calibration: list[dict[str, Any]] | None
    polish_data: list[dict[str, Any]] | None
    options: dict[str, Any]
    score: Callable[[str], Any]


def _sentences_to_search(
    task: ClassificationTask,
    model: Any,
    tokenizer: Any,
    config: PruningConfig,
    held_out: int,
    split: str,
    batch_size: int,
) -> _SearchData:
    final_data = task.load_scored(split)
    check_columns(final_data, [*task.texts, task.columns["label_column"]], f"the split {split!r}")
    labels = task.load(task.calibration_split)
    with rows_named(task.source, task.calibration_split):
        class_numbers(labels, task.columns["label_column"], model)  # raises, naming rows of the data
    seen = task.samples_seen(config, held_out)
    options: dict[str, Any] = {"source": display_name(task.source), "batch_size": batch_size, **task.columns}

    def score(title: str) -> Evaluation:
        return evaluate_classification(
            model, tokenizer, final_data, split=split, progress=is_main_process() and title, **options
        )

    return _SearchData(
        task.held_out(held_out, seen),
        task.calibration_batches([config], model, tokenizer),
        task.polish_batches([config], model, tokenizer, seen),
        task.columns,
        score,
    )


def _windows_to_search(
    task: LanguageModelingTask,
    model: Any,
    tokenizer: Any,
    config: PruningConfig,
    held_out: int,
    split: str,
    limit: int | None,
) -> _SearchData:
    from datasets import Dataset

    window = task.window_of(model)
    task.load(split)  # raises before anything is measured
    learned, rest = task.learned_and_held_out()
    scored, tokens = [], 0
    for text in rest:
        scored.append(text)
        tokens += len(joined_tokens([text], tokenizer))
        if tokens >= held_out * window:
            break
    return _SearchData(
        Dataset.from_dict({"text": scored}),
        task.learned_windows(learned, [config], model, tokenizer),
        None,
        {"kind": "language-modeling", "max_length": window},
        lambda title: task.score(
            model, tokenizer, split, window=window, limit=limit, progress=is_main_process() and title
        ),
    )
