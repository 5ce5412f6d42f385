"""Score a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_prune.cli.workflows.loading import load_for_task
from hf_prune.errors import DataError
from hf_prune.evaluation.accuracy_result import Evaluation
from hf_prune.evaluation.benchmarks import compare_benchmarks, evaluate_benchmarks
from hf_prune.evaluation.examples.score import ExampleScore
from hf_prune.evaluation.generation import compare_generation
from hf_prune.evaluation.perplexity_result import Perplexity
from hf_prune.evaluation.scores import score_model
from hf_prune.evaluation.sentence_result import SentenceScore
from hf_prune.evaluation.tasks import LanguageModelingTask, RawTask, Task
from hf_prune.evaluation.tasks.raw import NO_TASK
from hf_prune.utils.formatting import display_name

Score = Evaluation | Perplexity | SentenceScore | ExampleScore


def evaluate_checkpoint(source: str, task: Task, split: str, **options: Any) -> Score:
    """Score a checkpoint on a task.

    Args:
        source: Folder or Hub id.
        task: What the model is for, and the data to score it on.
        split: Which split, where there are splits.
        **options: Passed to :func:`hf_prune.evaluate_classification`, :func:`hf_prune.evaluate_perplexity` or
            :func:`hf_prune.evaluate_sentences`, or of other tasks :func:`hf_prune.evaluate_examples`.
    """
    model, tokenizer = load_for_task(source, task)
    return task.score(model, tokenizer, split, progress=display_name(source), **options)


def evaluate_language_model(
    source: str,
    task: LanguageModelingTask,
    split: str,
    *,
    prompts: int | None = None,
    new_tokens: int | None = None,
    benchmarks: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = lambda text: None,
    **options: Any,
) -> dict[str, Any]:
    """Score a language model by what it predicts and by what it writes, and by tasks of lm-eval.

    Args:
        source: Folder or Hub id.
        task: The data to score it on.
        split: Which split, where there are splits.
        prompts: How many prompts it continues; None for those that the data has, 0 for none.
        new_tokens: See :func:`hf_prune.evaluate_generation`.
        benchmarks: Arguments of :func:`hf_prune.evaluate_benchmarks`; None for none.
        say: Told why there is no generative score, where none was asked for.
        **options: Passed to :func:`hf_prune.evaluate_perplexity`.

    Returns:
        ``"evaluation"``, the perplexity; ``"generation"``, if anything was written; and ``"benchmarks"``.
    """
    model, tokenizer = load_for_task(source, task)
    title = display_name(source)
    scores: dict[str, Any] = {
        "evaluation": task.score(model, tokenizer, split, progress=title, **options),
    }
    if prompts != 0:
        asked: dict[str, Any] = {} if prompts is None else {"prompts": prompts}
        try:
            scores["generation"] = task.write(
                model, tokenizer, split, progress=f"{title}: writing", new_tokens=new_tokens, **asked
            )
        except DataError as error:
            if prompts is not None:
                raise
            say(f"no generative score of {title}, since {error}")
    if benchmarks is not None:
        scores["benchmarks"] = evaluate_benchmarks(model, tokenizer, **benchmarks)
    return scores


def score_held_out(folder: str, task: Task, claimed: Mapping[str, Any]) -> Any:
    """Score a model again on what a search held out of the data that it learned from.

    Args:
        folder: Its checkpoint.
        task: The data; of language models see :func:`measure_held_out_texts`.
        claimed: The score among the facts of the card, with ``"held_out"``, by what it was held out.

    Raises:
        DataError: If the task has nothing of the kind.
    """
    assert not isinstance(task, LanguageModelingTask)
    if isinstance(task, RawTask):
        raise DataError(f"the score of {folder} is of held-out data, and of this model none is: {NO_TASK}")
    recipe = claimed["held_out"]
    model, tokenizer = load_for_task(folder, task)
    data = task.held_out(recipe["n"], recipe["seen"], model)
    named = {"split": task.calibration_split, **task.columns}
    return score_model(model, tokenizer, data, progress=display_name(folder), **named)


def measure_held_out_texts(folder: str, task: LanguageModelingTask, claimed: Mapping[str, Any]) -> dict[str, Any]:
    """Measure a language model again on what a search held out of the texts that it learned from.

    Args:
        folder: Its checkpoint.
        task: The texts.
        claimed: The score among the facts of the card, with ``"held_out"``.
    """
    recipe = claimed["held_out"]
    held_out = HeldOutTexts(task.source, task.text_column, texts=tuple(task.learned_and_held_out()[1]))
    again = {**claimed, "window": recipe["window"], "n": recipe["n"]}
    return {**measure_again(folder, held_out, task.calibration_split, again), "split": task.calibration_split}


@dataclass(frozen=True)
class HeldOutTexts(LanguageModelingTask):
    """Some texts in place of those of a split.

    Args:
        texts: The texts, or conversations.
    """

    texts: tuple[Any, ...] = ()

    def load(self, split: str) -> list[Any]:
        """The texts."""
        return list(self.texts)


def measure_again(folder: str, task: LanguageModelingTask, split: str, claimed: Mapping[str, Any]) -> dict[str, Any]:
    """Measure a language model again as a card says that it was measured.

    Args:
        folder: Its checkpoint.
        task: The data.
        split: Which split, where there are splits.
        claimed: The score among the facts of the card.

    Returns:
        The values of the perplexity, and under ``"generation"`` those of what it writes, if the card has them.
    """
    model, tokenizer = load_for_task(folder, task)
    bos = bool(claimed.get("bos_in_every_window", False))
    title = display_name(folder)
    options: dict[str, Any] = {"window": claimed.get("window"), "limit": claimed.get("n"), "bos_in_every_window": bos}
    values = task.score(model, tokenizer, split, progress=title, **options).to_dict()
    if (written := claimed.get("generation")) is not None:
        settings: dict[str, Any] = {name: written[name] for name in ("prompt_tokens", "new_tokens", "chat")}
        again = task.write(model, tokenizer, split, prompts=written["n"], progress=f"{title}: writing", **settings)
        values["generation"] = again.to_dict()
    return values


def compare_parts(task: Task, dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> dict[str, Any]:
    """What two models have both been scored by, compared, under the same names.

    Args:
        task: Of both.
        dense: What :func:`evaluate_language_model` returned, or an ``"evaluation"`` alone.
        pruned: The same of the pruned model.
    """
    compare: dict[str, Any] = {
        "evaluation": task.compare,
        "generation": compare_generation,
        "benchmarks": compare_benchmarks,
    }
    return {name: compare[name](dense[name], score) for name, score in pruned.items() if name in dense}
