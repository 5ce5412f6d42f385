"""Find the largest sparsity whose loss of accuracy, or of perplexity, is within a budget, by bisection."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch

from hf_prune.errors import BudgetError, ConfigError
from hf_prune.evaluation.accuracy_result import Evaluation
from hf_prune.evaluation.allowed_loss import AllowedLoss, Loss, check_budget, check_scored_by_accuracy, check_size
from hf_prune.evaluation.scores import Score, score_doubt, score_model
from hf_prune.evaluation.statistics import check_confidence
from hf_prune.evaluation.sweep import check_points, measure_point
from hf_prune.evaluation.sweep_point import SweepPoint
from hf_prune.planning.config import PruningConfig
from hf_prune.utils.distributed import broadcast
from hf_prune.utils.formatting import format_table
from hf_prune.utils.results import Result

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

FORMAT_VERSION = 1
STEPS = 100  # from sparsity 0 to 1: the resolution of the answer


@dataclass(frozen=True, repr=False)
class SparsitySearch(Result):
    """What :func:`find_sparsity` measured and chose. ``print(search)`` shows it as a table.

    Args:
        config: The settings, with the sparsity that was chosen.
        max_drop: The largest accepted loss: points of accuracy, or for language models per cent of perplexity; None if
            ``max_flips`` decided.
        confidence: Of the one-sided bound that decides, 0 to 1.
        dense: The score of the dense model.
        points: Every sparsity that was measured, smallest first; the chosen one is among them.
        max_flips: The largest accepted share of changed answers, in percent; None if ``max_drop`` decided.
    """

    bars = ("evaluation.accuracy", "evaluation.value", "sparsity")

    config: PruningConfig
    max_drop: float | None
    confidence: float
    dense: Score
    points: tuple[SweepPoint, ...]
    max_flips: float | None = None

    @property
    def allowed(self) -> AllowedLoss:
        """What decided."""
        return AllowedLoss.of(self.max_drop, self.max_flips)

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
            "max_flips": self.max_flips,
            "confidence": self.confidence,
            "resolution": 1 / STEPS,
            "dense": _summary(self.dense),
            "points": [
                {
                    **{f.name: getattr(p, f.name) for f in dataclasses.fields(p) if f.name not in _SCORES},
                    "within": _lost(p, self.allowed).bound <= self.allowed.most,
                    "evaluation": _summary(p.evaluation),
                    "comparison": p.comparison.to_dict(),
                }
                for p in self.points
            ],
        }

    def __str__(self) -> str:
        percent, allowed = f"{100 * self.confidence:g} %", self.allowed
        unit = _unit(self.dense, allowed)
        header = ["target", "of all weights", unit.name, "lost ± s.e.", f"at most ({percent})", "within"]
        rows = [["0 %", "0.00 %", unit.show(self.dense.value), "-", "-", "-"]] + [
            [
                f"{100 * p.sparsity:g} %",
                f"{100 * p.model_sparsity:.2f} %",
                unit.show(p.evaluation.value),
                f"{lost.value:.2f} ± {lost.standard_error:.2f}",
                f"{lost.bound:.2f}",
                "yes" if lost.bound <= allowed.most else "no",
            ]
            for p, lost in ((p, _lost(p, allowed)) for p in self.points)
        ]
        where = " ".join(filter(None, [self.dense.source, self.dense.split]))
        best = _lost(self.chosen, allowed)
        return "\n".join(
            [
                format_table(header, rows),
                f"n = {self.dense.n} held-out {unit.examples} ({where}); lost in {unit.loss} against the dense model "
                f"on the same {unit.examples}, paired, with its one-sided bound.",
                f"Largest sparsity found within {allowed.most:g} {unit.loss}: {100 * self.sparsity:g} % with "
                f"{self.config.criterion}: it measurably lost {best.value:.2f}, and with {percent} "
                f"confidence at most {best.bound:.2f}.",
            ]
        )


_SCORES = ("evaluation", "comparison")
_PER_EXAMPLE = ("predictions", "labels", "kept", "distributions")


@dataclass(frozen=True)
class _Unit:
    """How a score and a loss are shown.

    Args:
        name: Of the score.
        loss: What a loss is in.
        examples: What is scored.
        show: A score as text.
        lost: A drop in points as a loss.
    """

    name: str
    loss: str
    examples: str
    show: Callable[[float], str]
    lost: Callable[[float], float]


_ACCURACY = _Unit("accuracy", "points", "sentences", lambda value: f"{100 * value:.2f} %", float)
# Points of log-likelihood, hundredths of a nat: a ratio of exp(points / 100).
_PERPLEXITY = _Unit(
    "perplexity",
    "per cent of perplexity",
    "windows",
    lambda value: f"{math.exp(-value):.2f}",
    lambda points: 100 * math.expm1(points / 100),
)


_CHANGED = dataclasses.replace(_ACCURACY, loss="% of the answers")


def _unit(score: Score, allowed: AllowedLoss) -> _Unit:
    if allowed.flips:
        return _CHANGED
    return _ACCURACY if isinstance(score, Evaluation) else _PERPLEXITY


def _lost(point: SweepPoint, allowed: AllowedLoss) -> Loss:
    lost, unit = allowed.loss(point.comparison), _unit(point.evaluation, allowed)
    return Loss(unit.lost(lost.value), lost.standard_error, unit.lost(lost.bound))


def find_sparsity(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset,
    *,
    max_drop: float | None = None,
    max_flips: float | None = None,
    config: PruningConfig | None = None,
    calibration: Sequence[Mapping[str, Any]] | None = None,
    polish_data: Sequence[Mapping[str, Any]] | None = None,
    confidence: float = 0.95,
    progress: bool | None = None,
    **evaluation: Any,
) -> SparsitySearch:
    """Find the largest sparsity that loses, with the stated confidence, at most ``max_drop`` or ``max_flips``.

    Bisection over whole percents from 1 to 99, pruning from the dense weights each time: at most seven prunings. A
    sparsity is within the budget if the one-sided upper bound of its paired drop is, as for the sweet spot of a sweep;
    the chosen one was itself measured. Accuracy need not fall monotonically, so a larger sparsity within the budget can
    be missed; and since the best of several measurements is chosen, its bound is a little optimistic. Measure the final
    model on data that played no part in the search.

    Args:
        model: A dense sequence classifier or causal language model; it is dense again afterwards.
        tokenizer: Its tokenizer.
        dataset: For a classifier, labelled sentences to score, as for :func:`hf_prune.evaluate_classification`:
            held-out training sentences, none of them in ``calibration``. How many decides what can be shown: with
            2,000, a drop of nothing is known to about 0.1 points if hardly any prediction changes, and to 0.7 if 4 %
            do. For a language model, texts that calibration did not see.
        max_drop: Largest accepted loss: points of accuracy; for language models per cent of perplexity, so that 5 means
            at most 1.05 times the dense model's.
        max_flips: Instead, for classifiers: largest accepted share of answers that change, right or not, in percent.
            Stricter than the same number of points, since nothing cancels out.
        config: All other settings; its sparsity does not matter.
        calibration: Batches for criteria that need them.
        polish_data: Batches for a polish, if more or others than ``calibration``; none of them in ``dataset`` either.
        confidence: Of the bound, between 0 and 1.
        progress: Show progress bars.
        **evaluation: Passed to :func:`hf_prune.evaluate_classification`; with ``kind="language-modeling"``, to
            :func:`hf_prune.evaluate_examples`.

    Returns:
        The search; ``model.prune(search.config, calibration=calibration)`` prunes as it found best, with the same
        ``polish_data`` if there was any.

    Raises:
        BudgetError: If no sparsity is within the budget, or none could be shown to be with so few sentences; or if the
            dense model does not do the task, see :func:`reason_to_doubt`: before anything is pruned.
        ConfigError: If not exactly one of ``max_drop`` and ``max_flips`` is given, it or ``confidence`` is out of
            range, the granularity fixes the sparsity, or the model's answers are not classes.
        SweepError: If the model is pruned already.
        HfPruneError: As :func:`hf_prune.prune` does, before anything is measured.

    Example:
        >>> search = find_sparsity(model, tokenizer, held_out, max_drop=1.0)  # doctest: +SKIP
        >>> model.prune(search.config)  # doctest: +SKIP
    """
    base = config or PruningConfig()
    allowed = check_budget(base, max_drop, max_flips)
    check_confidence(confidence)
    check_points(model, [base.replace(sparsity=1 / STEPS)], calibration, polish_data)
    of_language = evaluation.get("kind") == "language-modeling"
    if of_language and allowed.flips:
        raise ConfigError(f"max_flips is {max_flips!r}, and language models lose per cent of perplexity: use max_drop")
    if not of_language:
        check_scored_by_accuracy(model, allowed, evaluation)
        check_size(len(dataset), allowed, confidence)
    dense = score_model(model, tokenizer, dataset, **evaluation, progress=progress and "dense")
    if doubt := score_doubt(dense, confidence):
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
        fits = _lost(point, allowed).bound <= allowed.most
        if base.needs_data:  # all processes prune together next: they must agree on the sparsity
            fits = bool(broadcast(torch.tensor(fits)))
        within, beyond = (step, beyond) if fits else (within, step)
    points.sort(key=lambda p: p.sparsity)
    if not within:
        raise BudgetError(_none_within(points[0], allowed))
    chosen = base.replace(sparsity=within / STEPS)
    return SparsitySearch(chosen, max_drop, confidence, dense, tuple(points), max_flips)


def _none_within(smallest: SweepPoint, allowed: AllowedLoss) -> str:
    drop, unit, lost = smallest.comparison, _unit(smallest.evaluation, allowed), _lost(smallest, allowed)
    what = "change" if allowed.flips else "drop"
    message = (
        f"no sparsity was found within {allowed.most:g} {unit.loss}: at {100 * smallest.sparsity:g} %, the measured "
        f"{what} is {lost.value:.2f} {unit.loss}, and with {100 * drop.confidence:g} % confidence at most "
        f"{lost.bound:.2f} (n = {drop.n:,}); "
    )
    if lost.value >= allowed.most:
        return message + f"choose another criterion, or accept a larger {what}"
    needed = (NormalDist().inv_cdf(drop.confidence) * lost.standard_error / (allowed.most - lost.value)) ** 2 * drop.n
    return (
        message + f"score about {max(drop.n, math.ceil(needed)):,} {unit.examples} or more, or accept a larger {what}"
    )


def _summary(evaluation: Score) -> dict[str, Any]:
    return {k: v for k, v in evaluation.to_dict().items() if k not in _PER_EXAMPLE}
