"""The winner of a search: saved as soon as it leads, and at the end scored once more, timed, and given its card."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hf_prune.auto import load_native, load_sentence_model
from hf_prune.checkpoint.staging import staged_checkpoint
from hf_prune.errors import DataError
from hf_prune.evaluation.generation import compare_generation, evaluate_generation
from hf_prune.evaluation.saved_scores import scores_to_dict
from hf_prune.evaluation.sparsity_report import SparsityReport
from hf_prune.evaluation.tasks import LanguageModelingTask, SentenceTask, Task
from hf_prune.hub.card import write_card
from hf_prune.hub.card_data import read_card_data
from hf_prune.hub.checksums import measured_weights
from hf_prune.hub.describe import calibration_of
from hf_prune.inference.latency import measure_latency
from hf_prune.search.goals import Goal
from hf_prune.search.held_out import HeldOut
from hf_prune.search.result import SearchResult
from hf_prune.utils.files import write_text
from hf_prune.utils.notices import warn_user
from hf_prune.utils.wrapping import is_sentence_model, sole_model


def save_winner(
    model: Any, tokenizer: Any, report: SparsityReport, folder: Path, goal: Goal, *, overwrite: bool, announce: bool
) -> None:
    """Save a model, its tokenizer and its report, in place of the winner before it.

    Args:
        model: The pruned model.
        tokenizer: Its tokenizer or processor; not used of a model of sentence-transformers, which has its own.
        report: What is zero or gone.
        folder: The folder of the winner.
        goal: Whose checkpoints are compressed or not.
        overwrite: Replace files that a search did not write.
        announce: Say which files are replaced.

    Raises:
        CheckpointError: If such files are in the way.
    """
    with staged_checkpoint(folder, "auto", overwrite=overwrite, announce=announce) as staging:
        if is_sentence_model(model):  # without the card that it would write
            model.save_pretrained(staging, compressed=goal.compressed, create_model_card=False)
        else:
            model.save_pretrained(staging, compressed=goal.compressed)
            tokenizer.save_pretrained(staging)
        write_text(staging / "sparsity_report.json", report.to_json())


def publish(
    result: SearchResult,
    model: Any,
    tokenizer: Any,
    task: Task,
    folder: Path,
    split: str | None,
    facts: dict[str, Any],
    evaluation: dict[str, Any],
    data: HeldOut,
    dense: Any,
) -> SearchResult:
    """Score the winner on a split that had no influence, or else on what it was chosen on; time it; write its card.

    Args:
        result: What was measured.
        model: The dense model.
        tokenizer: Its tokenizer.
        task: The data.
        folder: The folder of the winner.
        split: The split; None if there is none.
        facts: Other facts of the card: its name, the base model and the command; None for what is not known.
        evaluation: Options of the evaluation.
        data: What the candidates were scored on.
        dense: The score of the dense model on it.

    Returns:
        The result, with the comparison on the split.
    """
    winner: Any = (load_sentence_model if isinstance(task, SentenceTask) else load_native)(str(folder))
    best = result.best
    assert best is not None
    facts = dict(facts)
    facts["calibration"] = calibration_of(best.config, task)
    if split is not None:
        scores: list[Any] = [task.score(each, tokenizer, split, **evaluation) for each in (model, winner)]
        result = dataclasses.replace(result, reported=f"{split}: {task.compare(*scores)}")
    else:
        source = f"{Path(dense.source).name} (held out from calibration, but this model was chosen on it)"
        scores = [dataclasses.replace(score, source=source) for score in (dense, data.score(winner, ""))]
    of_dense, of_winner = ({"evaluation": score} for score in scores)
    compared: dict[str, Any] = {"evaluation": task.compare(*scores)}
    if isinstance(task, LanguageModelingTask):
        texts = data.texts if split is None else task.load(split)
        named = {"source": scores[0].source, "split": scores[0].split}
        try:
            written = [evaluate_generation(each, tokenizer, texts, **named) for each in (model, winner)]
            of_dense["generation"], of_winner["generation"] = written
            compared["generation"] = compare_generation(*written)
        except DataError as error:
            warn_user(f"the card has no generative score, since {error}")
    values = scores_to_dict(of_winner, of_dense, compared)
    if split is None:
        values["held_out"] = dict(data.recipe)
    facts["evaluation"] = {"weights": measured_weights(str(folder)), **values}
    if result.goal == "faster":
        load = best.config.workload
        assert load is not None
        timed = measure_latency(
            {"dense": sole_model(model), "pruned": sole_model(winner)},
            batch_sizes=[load["batch_size"]],
            lengths=[load.get("length", load.get("prompt", 0))],
            new_tokens=load.get("new_tokens", 0),
        )
        facts["latency"] = {**timed.to_dict(), "weights": {"pruned": measured_weights(str(folder))}}
    write_card(folder, read_card_data(folder, **{key: value for key, value in facts.items() if value is not None}))
    return result
