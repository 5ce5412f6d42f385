"""Find the largest sparsity whose drop in accuracy is within a budget, by bisection."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch

from hf_prune.errors import BudgetError, ConfigError
from hf_prune.evaluation.accuracy import evaluate_classification
from hf_prune.evaluation.accuracy_result import Evaluation
from hf_prune.evaluation.comparison import compare, reason_to_doubt
from hf_prune.evaluation.scores import Score
from hf_prune.evaluation.statistics import check_confidence
from hf_prune.evaluation.sweep import check_points, measure_point
from hf_prune.evaluation.sweep_point import SweepPoint
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.traits import fixed_sparsity
from hf_prune.utils.distributed import broadcast
from hf_prune.utils.formatting import format_table

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

FORMAT_VERSION = 1
STEPS = 100  # from sparsity 0 to 1: the resolution of the answer


@dataclass(frozen=True)
class SparsitySearch:
    """What :func:`find_sparsity` measured and chose. ``print(search)`` shows it as a table.

    Args:
        config: The settings, with the sparsity that was chosen.
        max_drop: The largest accepted drop, in points of accuracy.
        confidence: Of the one-sided bound that decides, 0 to 1.
        dense: The score of the dense model.
        points: Every sparsity that was measured, smallest first; the chosen one is among them.
    """

    config: PruningConfig
    max_drop: float
    confidence: float
    dense: Evaluation
    points: tuple[SweepPoint, ...]

    @property
    def sparsity(self) -> float:
        """The chosen sparsity, 0.01 to 0.99."""
        assert self.config.sparsity is not None
        return self.config.sparsity

    @property
    def chosen(self) -> SweepPoint:
        """What was measured there."""
        return next(p for p in self.points if p.sparsity == self.sparsity)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; of the scores the summaries only, not every prediction."""
        return {
            "format_version": FORMAT_VERSION,
            "config": self.config.to_dict(),
            "sparsity": self.sparsity,
            "max_drop": self.max_drop,
            "confidence": self.confidence,
            "resolution": 1 / STEPS,
            "dense": _summary(self.dense),
            "points": [
                {
                    **{f.name: getattr(p, f.name) for f in dataclasses.fields(p) if f.name not in _SCORES},
                    "within": p.comparison.upper_bound <= self.max_drop,
                    "evaluation": _summary(p.evaluation),
                    "comparison": p.comparison.to_dict(),
                }
                for p in self.points
            ],
        }

    def __str__(self) -> str:
        percent = f"{100 * self.confidence:g} %"
        header = ["target", "of all weights", "accuracy", "drop ± s.e.", f"at most ({percent})", "within"]
        rows = [["0 %", "0.00 %", f"{100 * self.dense.accuracy:.2f} %", "-", "-", "-"]] + [
            [
                f"{100 * p.sparsity:g} %",
                f"{100 * p.model_sparsity:.2f} %",
                f"{100 * p.evaluation.value:.2f} %",
                f"{p.comparison.drop:.2f} ± {p.comparison.drop_standard_error:.2f}",
                f"{p.comparison.upper_bound:.2f}",
                "yes" if p.comparison.upper_bound <= self.max_drop else "no",
            ]
            for p in self.points
        ]
        where = " ".join(filter(None, [self.dense.source, self.dense.split]))
        best = self.chosen
        return "\n".join(
            [
                format_table(header, rows),
                f"n = {self.dense.n} held-out sentences ({where}); drop in points against the dense model on the same "
                f"sentences, paired, with its one-sided bound.",
                f"Largest sparsity found within {self.max_drop:g} points: {100 * self.sparsity:g} % with "
                f"{self.config.criterion}: its measured drop is {best.comparison.drop:.2f} points, and with {percent} "
                f"confidence at most {best.comparison.upper_bound:.2f}.",
            ]
        )


_SCORES = ("evaluation", "comparison")


def find_sparsity(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset,
    *,
    max_drop: float,
    config: PruningConfig | None = None,
    calibration: Sequence[Mapping[str, Any]] | None = None,
    polish_data: Sequence[Mapping[str, Any]] | None = None,
    confidence: float = 0.95,
    progress: bool = False,
    **evaluation: Any,
) -> SparsitySearch:
    """Find the largest sparsity whose drop in accuracy is, with the stated confidence, at most ``max_drop``.

    Bisection over whole percents from 1 to 99, pruning from the dense weights each time: at most seven prunings. A
    sparsity is within the budget if the one-sided upper bound of its paired drop is, as for the sweet spot of a sweep;
    the chosen one was itself measured. Accuracy need not fall monotonically, so a larger sparsity within the budget can
    be missed; and since the best of several measurements is chosen, its bound is a little optimistic. Measure the final
    model on data that played no part in the search.

    Args:
        model: A dense sequence classifier; it is dense again afterwards.
        tokenizer: Its tokenizer.
        dataset: Labelled sentences to score, as for :func:`hf_prune.evaluate_classification`: held-out training
            sentences, none of them in ``calibration``. How many decides what can be shown: with 2,000, a drop of
            nothing is known to about 0.1 points if hardly any prediction changes, and to 0.7 if 4 % do.
        max_drop: Largest accepted drop, in points of accuracy.
        config: All other settings; its sparsity does not matter.
        calibration: Batches for criteria that need them.
        polish_data: Batches for a polish, if more or others than ``calibration``; none of them in ``dataset`` either.
        confidence: Of the bound, between 0 and 1.
        progress: Show progress bars.
        **evaluation: Passed to :func:`hf_prune.evaluate_classification`.

    Returns:
        The search; ``model.prune(search.config, calibration=calibration)`` prunes as it found best, with the same
        ``polish_data`` if there was any.

    Raises:
        BudgetError: If no sparsity is within the budget, or none could be shown to be with so few sentences; or if the
            dense model does not do the task, see :func:`reason_to_doubt`: before anything is pruned.
        ConfigError: If ``max_drop`` or ``confidence`` is out of range, or the granularity fixes the sparsity.
        SweepError: If the model is pruned already.
        HfPruneError: As :func:`hf_prune.prune` does, before anything is measured.

    Example:
        >>> search = find_sparsity(model, tokenizer, held_out, max_drop=1.0)  # doctest: +SKIP
        >>> model.prune(search.config)  # doctest: +SKIP
    """
    base = config or PruningConfig()
    check_budget(base, max_drop)
    check_confidence(confidence)
    check_points(model, [base.replace(sparsity=1 / STEPS)], calibration, polish_data)
    _check_size(len(dataset), max_drop, confidence)
    dense = evaluate_classification(model, tokenizer, dataset, **evaluation, progress=progress and "dense")
    if doubt := reason_to_doubt(dense, confidence):
        raise BudgetError(f"no sparsity can be found by its drop in accuracy, since {doubt}")
    points: list[SweepPoint] = []
    within, beyond = 0, STEPS
    while beyond - within > 1:
        step = (within + beyond) // 2
        point_config = base.replace(sparsity=step / STEPS)
        point = measure_point(
            model,
            tokenizer,
            dataset,
            point_config,
            calibration,
            dense,
            confidence,
            evaluation,
            progress,
            polish_data=polish_data,
        )
        points.append(point)
        fits = point.comparison.upper_bound <= max_drop
        if base.needs_data:  # all processes prune together next: they must agree on the sparsity
            fits = bool(broadcast(torch.tensor(fits)))
        within, beyond = (step, beyond) if fits else (within, step)
    points.sort(key=lambda p: p.sparsity)
    if not within:
        raise BudgetError(_none_within(points[0], max_drop))
    return SparsitySearch(base.replace(sparsity=within / STEPS), max_drop, confidence, dense, tuple(points))


def check_budget(config: PruningConfig, max_drop: object) -> None:
    """Make sure that a sparsity can be searched for.

    Raises:
        ConfigError: If the budget is out of range, or the granularity fixes the sparsity.
    """
    number = isinstance(max_drop, numbers.Real) and not isinstance(max_drop, bool)
    if not number or not 0 < float(max_drop) < 100:  # type: ignore[arg-type]
        raise ConfigError(f"max_drop is {max_drop!r}: expected points of accuracy between 0 and 100, such as 1.0")
    if fixed_sparsity(config) is not None:
        raise ConfigError(
            f"max_drop contradicts granularity={config.granularity!r}, which fixes the sparsity at "
            f"{config.sparsity:g}: there is nothing to search for; prune, and compare the result with the dense model"
        )


def _check_size(n: int, max_drop: float, confidence: float) -> None:
    """Make sure that there are enough examples to show a drop within the budget.

    The smallest possible bound is that of a model that changes no prediction.
    """
    right = Evaluation(1.0, n, 0.0, (0,) * n, (0,) * n, "", "", "", 0.0, "", 0, 0)
    bound = compare(right, right, confidence=confidence).upper_bound
    if bound > max_drop:
        raise BudgetError(
            f"a drop of at most {max_drop:g} points cannot be shown with {n:,} sentences: even of an unchanged model "
            f"it is only known to be at most {bound:.2f} points; score {math.ceil(n * bound / max_drop):,} or more, or "
            f"accept a larger drop"
        )


def _none_within(smallest: SweepPoint, max_drop: float) -> str:
    drop = smallest.comparison
    message = (
        f"no sparsity was found within {max_drop:g} points: at {100 * smallest.sparsity:g} %, the measured drop is "
        f"{drop.drop:.2f} points, and with {100 * drop.confidence:g} % confidence at most {drop.upper_bound:.2f} "
        f"(n = {drop.n:,}); "
    )
    if drop.drop >= max_drop:
        return message + "choose another criterion, or accept a larger drop"
    needed = (NormalDist().inv_cdf(drop.confidence) * drop.drop_standard_error / (max_drop - drop.drop)) ** 2 * drop.n
    return message + f"score about {max(drop.n, math.ceil(needed)):,} sentences or more, or accept a larger drop"


def _summary(evaluation: Score) -> dict[str, Any]:
    return {k: v for k, v in evaluation.to_dict().items() if k not in ("predictions", "labels")}
