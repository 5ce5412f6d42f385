"""auto_prune(): the loop of a search, what it keeps on disk, and the checkpoint with its card at the end."""

from __future__ import annotations

import dataclasses
import logging
import math
import numbers
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from hf_prune.errors import BudgetError, ConfigError, PlanError
from hf_prune.evaluation.allowed_loss import AllowedLoss
from hf_prune.evaluation.data.files import refuse_same_split
from hf_prune.evaluation.tasks import LanguageModelingTask, RawTask, Task
from hf_prune.mixin import prunable
from hf_prune.planning.checks import check_positive
from hf_prune.planning.config import PruningConfig
from hf_prune.search.earlier import check_folders
from hf_prune.search.goals import PRESETS_TRIED, Goal, goal_named
from hf_prune.search.held_out import held_out_data
from hf_prune.search.measure import measure_candidate, saved_size, value_of
from hf_prune.search.point import SearchPoint
from hf_prune.search.publish import publish, save_winner
from hf_prune.search.result import SearchResult, best_of
from hf_prune.utils.digests import tensors_digest
from hf_prune.utils.files import write_json
from hf_prune.utils.formatting import format_duration
from hf_prune.utils.locks import writes_alone
from hf_prune.utils.notices import reported, warn_user

_log = logging.getLogger(__name__)
MODEL = "model"  # the folder of the winner's checkpoint in the output
_SEEN = "a model looks better than it is on the data that its settings were chosen on"


@writes_alone("auto")
@reported()
def auto_prune(
    model: Any,
    tokenizer: Any,
    task: Task,
    out: str | os.PathLike[str],
    *,
    goal: str = "faster",
    max_drop: float | None = None,
    max_flips: float | None = None,
    time_limit: float | None = None,
    presets: Sequence[str] = PRESETS_TRIED[:3],
    uniform: bool = False,
    held_out: int = 4000,
    split: str | None = None,
    workload: dict[str, int] | None = None,
    seed: int = 0,
    restart: bool = False,
    overwrite: bool = False,
    name: str = "",
    base_model: str | None = None,
    command: str | None = None,
    progress: bool = False,
    **evaluation: Any,
) -> SearchResult:
    """Try presets at rising levels, cheapest first, and keep the best checkpoint within an accepted loss.

    A preset is tried at ever higher levels (2x, 3x as fast; 70 %, 80 % zeros) until it loses too much; the next, more
    accurate one begins where the one before it failed; settings that several presets share are tried once. Each
    candidate is pruned from the dense weights and scored on data that it did not learn from, of the same split: for
    language models, the last quarter of the texts, which may repeat phrases of the others; for other models, texts that
    share no five words in a row with what was learned from, or other images. The winner is scored once more on a split
    that had no influence.

    ``out`` gets ``results.json`` after every candidate, so that the same call continues an interrupted search, at the
    end ``results.csv`` and ``tradeoff.png``, and in ``model/`` the best checkpoint so far, with a card at the end.

    Args:
        model: A dense model that does the task; it is not changed.
        tokenizer: Its tokenizer or processor; not used of a model of sentence-transformers, which has its own.
        task: Its data: a ``ClassificationTask``, ``LanguageModelingTask`` or ``SentenceTask``, or an ``ExampleTask`` of
            any other kind and metric.
        out: The folder to write.
        goal: ``"faster"``: heads and neurons go, timed on the ``workload``. ``"smaller"``: zeros, saved compressed.
            ``"sparser"``: zeros.
        max_drop: The largest accepted loss that is shown with 95 % confidence: in points of the metric, which are
            hundredths (from an F1 of 0.91 to 0.90 is one), or in per cent of perplexity. By default 1, without
            ``max_flips``.
        max_flips: Instead, for classifiers: the largest share of answers that may change, right or not, in percent.
        time_limit: Seconds after which no further candidate is begun; None for no limit.
        presets: Those that are tried, cheapest first.
        uniform: Also try to keep equal sizes in all layers, which plain transformers loads: they win where they lose at
            most 0.3 more. For the goal ``"faster"``.
        held_out: The most examples, queries or windows of tokens that candidates are scored on.
        split: The split on which the winner is scored; None for no such score: then its card has the held-out one.
        workload: For the goal ``"faster"``: ``{"batch_size": 1, "length": 128}``.
        seed: Seed of everything that is random while pruning.
        restart: Measure everything again.
        overwrite: Replace what is in the way in ``out``.
        name: What to call the model.
        base_model: Hub id of the dense model, for the card.
        command: The command that was run, for the card.
        progress: Show progress bars.
        **evaluation: Options of the evaluation, such as ``batch_size``.

    Returns:
        What was measured, and why the winner won.

    Raises:
        BudgetError: If the dense model does not do the task.
        ConfigError: If a setting is unknown or out of range.
        DataError: If the data does not fit the model, too little of it remains to score, or there is no ``split``.
        SweepError: If ``out`` holds a search of other settings, or ``results.json`` in it is not of a search.
        CheckpointError: If ``out`` or ``out/model`` holds something that a search did not write.

    Example:
        >>> result = auto_prune(model, tokenizer, ClassificationTask("glue/sst2"), "faster")  # doctest: +SKIP
        >>> print(result)  # doctest: +SKIP
    """
    aim = goal_named(goal)
    if max_drop is None and max_flips is None:
        max_drop = 1.0
    allowed = AllowedLoss.of(None, max_flips) if max_drop is None else AllowedLoss(max_drop)
    _check(max_drop, max_flips, time_limit, held_out, presets, uniform, workload, aim)
    folder = Path(out)
    results = folder / "results.json"
    earlier = check_folders(folder, folder / MODEL, overwrite=overwrite)
    if split is not None:
        refuse_same_split(
            task.source, split, getattr(task, "calibration_split", split), "searched and reported on", _SEEN
        )
    more: dict[str, Any] = {"seed": seed, **({} if workload is None else {"workload": workload})}
    configs = [aim.config(preset, level, **more) for preset in presets for level in aim.levels]
    data = held_out_data(task, model, tokenizer, configs, held_out, allowed=allowed, **evaluation)
    if split is not None:
        assert not isinstance(task, RawTask)  # of which nothing is held out
        (task.load if isinstance(task, LanguageModelingTask) else task.load_scored)(split)  # raises before the first
    settings = {
        "model": name or type(model).__name__,
        "weights": tensors_digest(model.named_parameters()),
        "data": data.description,
        "calibration_samples": task.calibration_samples,
        "workload": workload,
        "seed": seed,
        "lost": data.unit if allowed.flips else None,  # None as in searches before there was a choice
        "threads": torch.get_num_threads() if aim.name == "faster" else None,  # which times depend on
        "evaluation": evaluation,
        **data.identity,
    }
    if restart:
        earlier = None
    if earlier is not None:
        earlier.check_settings({"goal": goal, **settings})
    folder.mkdir(parents=True, exist_ok=True)
    dense = data.score(model, "dense: scoring" if progress else "")
    if doubt := data.doubt(dense):
        raise BudgetError(f"nothing can be chosen by what it loses, since {doubt}")
    result = SearchResult(
        goal=goal,
        max_drop=allowed.most,
        unit=data.unit,
        data=data.description,
        settings=settings,
        dense_score=value_of(dense),
        dense_size=saved_size(prunable(model), folder, compressed=aim.compressed),
        points=() if earlier is None else earlier.points,
        saved=earlier.saved if earlier is not None and (folder / MODEL).is_dir() else None,
    )

    def measure(result: SearchResult, name: str, preset: str, config: PruningConfig) -> SearchResult:
        """Measure a candidate, and save it if it is the best so far."""
        options: dict[str, Any] = {"compressed": aim.compressed, "folder": folder, "progress": progress}
        point, pruned, report = measure_candidate(model, config, data, dense, name=name, preset=preset, **options)
        others = [other for other in result.points if other.name != name]
        result = dataclasses.replace(result, points=(*others, point))
        if result.best is point:
            write_json(results, dataclasses.replace(result, saved=None).to_dict())  # until it is
            first = result.saved is None  # later ones replace what this search wrote
            save_winner(pruned, tokenizer, report, folder / MODEL, aim, overwrite=overwrite, announce=first)
            result = dataclasses.replace(result, saved=name)
        write_json(results, result.to_dict())
        _log.info(
            "%s: lost %.2f, at most %.2f; %s", name, point.loss.value, point.loss.bound, format_duration(point.seconds)
        )
        return result

    result = _search(result, measure, aim, presets, more, time_limit, uniform)
    while (best := result.best) is not None and result.saved != best.name:  # of a search with another accepted loss
        result = measure(result, best.name, best.preset, best.config)
    if result.best is not None:
        result = dataclasses.replace(result, folder=str(folder / MODEL))
        facts = {"name": f"{settings['model']}-{goal}", "base_model": base_model, "command": command}
        result = publish(result, model, tokenizer, task, folder / MODEL, split, facts, evaluation, data, dense)
    result.write(folder)
    return result


def _search(
    result: SearchResult,
    measure: Callable[[SearchResult, str, str, PruningConfig], SearchResult],
    goal: Goal,
    presets: Sequence[str],
    more: dict[str, Any],
    time_limit: float | None,
    uniform: bool,
) -> SearchResult:
    """Measure the candidates that have not been, one after the other."""
    begun, known = monotonic(), {point.name: point for point in result.points}
    points: dict[str, SearchPoint] = {}
    for name, preset, config in _ladder(goal, presets, more, uniform, points, result.max_drop):
        if name in known:
            points[name] = known[name]
            continue
        if time_limit is not None and monotonic() - begun >= time_limit:
            return dataclasses.replace(
                result, stopped=f"the time limit of {format_duration(time_limit)}, before {name!r}"
            )
        try:
            result = measure(result, name, preset, config)
        except PlanError as error:  # the level is out of reach of this model
            warn_user(f"{name!r} is not possible: {error}")
            result = dataclasses.replace(result, impossible={**result.impossible, name: str(error)})
            continue
        points[name] = result.points[-1]
    return result


def _ladder(
    goal: Goal,
    presets: Sequence[str],
    more: dict[str, Any],
    uniform: bool,
    points: dict[str, SearchPoint],
    max_drop: float,
) -> Iterator[tuple[str, str, PruningConfig]]:
    """The candidates, cheapest first: each preset begins at the level at which the one before it lost too much.

    For a goal, presets may stand for the same settings, which are tried once.
    """
    reached, tried = 0, []
    for preset in presets:
        for number in range(reached, len(goal.levels)):
            name = goal.label(preset, goal.levels[number])
            config = goal.config(preset, goal.levels[number], **more)
            if config in tried:  # and lost too much, or was not possible
                break
            tried.append(config)
            yield name, preset, config
            if name not in points or points[name].loss.bound > max_drop:
                break
            reached = number + 1
    best = best_of(tuple(points.values()), goal, max_drop)
    if uniform and best is not None and not best.plain:
        for kinds in (("head", "neuron"), ("neuron",)):
            config = best.config.replace(
                scope="layer",
                granularity=kinds,
                workload=best.config.workload,
                **{goal.setting: getattr(best.config, goal.setting)},
            )
            name = f"{best.name}, {' and '.join(kinds)}s alike in all layers"
            yield name, best.preset, config
            if name in points and points[name].plain:
                return


def _check(
    max_drop: float | None,
    max_flips: float | None,
    time_limit: float | None,
    held_out: int,
    presets: Sequence[str],
    uniform: bool,
    workload: object,
    goal: Goal,
) -> None:
    if max_drop is not None and max_flips is not None:
        AllowedLoss.of(max_drop, max_flips)  # refuses
    number = isinstance(max_drop, numbers.Real) and not isinstance(max_drop, bool)
    if max_drop is not None and not (number and 0 < max_drop < math.inf):
        raise ConfigError(f"max_drop is {max_drop!r}: expected a number above 0, such as 1")
    if time_limit is not None and not time_limit > 0:
        raise ConfigError(f"time_limit is {time_limit!r}: expected seconds above 0")
    check_positive("held_out", held_out)
    if not presets:
        raise ConfigError("presets is empty: expected at least one")
    if goal.name != "faster":
        for setting, value in (("uniform", uniform), ("workload", workload)):
            if value:
                raise ConfigError(f"{setting}={value!r} is for the goal 'faster', not for {goal.name!r}: leave it out")
