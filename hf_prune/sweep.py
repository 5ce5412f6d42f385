"""Sweep: prune from the dense weights at every sparsity, score each, and name the sweet spot.

Results are on disk after every point, so an interrupted sweep continues where it was; results of other
settings are never mixed in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import reprlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_prune.calibration import Batches, require_batches
from hf_prune.comparison import Comparison, compare, doubt_of
from hf_prune.config import PruningConfig
from hf_prune.data_loading import fingerprint
from hf_prune.errors import ConfigError, DataError, HfPruneError, SweepError
from hf_prune.evaluation import Evaluation, class_doubt, class_numbers, evaluate_classification
from hf_prune.files import read_json_object, write_json, write_text
from hf_prune.masking import MaskStore
from hf_prune.notices import warn_user
from hf_prune.outputs import check_output, say_replaced, writes_alone
from hf_prune.pipeline import prune
from hf_prune.plan import PruningPlan
from hf_prune.plots import plot_tradeoff, save_figure
from hf_prune.registry import parse_granularity
from hf_prune.report import sparsity_report
from hf_prune.tables import format_csv, format_table
from hf_prune.unit_plan import UnitPlan, unit_batches

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

FILES = ("results.json", "results.csv", "tradeoff.png")
FORMAT_VERSION = 1
_LARGEST = 1e15  # of any number in a result
_ROUNDED = 1000  # of so many weights one may become zero because a repair rounds it
_TOKENIZED = 64  # sentences by whose tokens tokenizers are told apart
# of a model's config: where it came from, and what a forward pass with labels fills in
_NOT_SETTINGS = ("_name_or_path", "transformers_version", "architectures", "problem_type")
DEFAULT_SPARSITIES = (0.3, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class SweepPoint:
    """One pruning, scored.

    Args:
        criterion: Which score.
        sparsity: The sparsity asked for.
        target_sparsity: Share of the target weights that is zero.
        model_sparsity: Zeros in the targets as a share of all parameters.
        remaining: Parameters of the whole model less those zeros.
        prune_seconds: How long pruning took, calibration included.
        evaluation: The score.
        comparison: The paired comparison with the dense model.
    """

    criterion: str
    sparsity: float
    target_sparsity: float
    model_sparsity: float
    remaining: int
    prune_seconds: float
    evaluation: Evaluation
    comparison: Comparison

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "evaluation": self.evaluation.to_dict(), "comparison": self.comparison.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], dense: Evaluation, confidence: float) -> SweepPoint:
        """The point that :meth:`to_dict` described; score and comparison are computed anew from the predictions.

        Raises:
            DataError: If a value is of another type or out of range, or not what the predictions give.
        """
        if not isinstance(values, dict) or not isinstance(values.get("evaluation"), dict):
            raise DataError(f"a point is {reprlib.repr(values)}: expected an object with a score")
        if not isinstance(values["criterion"], str):
            raise DataError(f"criterion is {values['criterion']!r}: expected a name")
        evaluation = Evaluation.from_dict(values["evaluation"])
        fields = {f.name: values[f.name] for f in dataclasses.fields(cls)}
        for name in ("sparsity", "target_sparsity", "model_sparsity", "remaining", "prune_seconds"):
            value, most = fields[name], 1 if name.endswith("sparsity") else math.inf
            types = (int,) if name == "remaining" else (int, float)
            if type(value) not in types or not (0 <= value <= most and value < _LARGEST):
                raise DataError(f"{name} is {value!r}: expected a number from 0 to {most:g}")
        fields |= {"evaluation": evaluation, "comparison": compare(dense, evaluation, confidence=confidence)}
        return cls(**fields)


@dataclass(frozen=True)
class SweepResult:
    """What a sweep measured. ``print(result)`` shows the table and the sweet spot.

    Args:
        settings: Everything that results must agree on to stand in one table.
        parameters: Parameters of the whole model.
        dense: The score of the dense model.
        points: One per criterion and sparsity.
        tolerance: Largest accepted drop, in points of accuracy.
        confidence: Confidence of the intervals and of the sweet spot.
    """

    settings: Mapping[str, Any]
    parameters: int
    dense: Evaluation
    points: tuple[SweepPoint, ...]
    tolerance: float
    confidence: float

    @property
    def doubt(self) -> str:
        """Why no drop here says what pruning costs, in words: the dense model does not do the task; else empty."""
        return doubt_of(self.dense, self.confidence)

    @property
    def sweet_spot(self) -> SweepPoint | None:
        """The largest sparsity whose drop is, with the stated confidence, at most the tolerance; or None.

        Decided by the one-sided upper bound of the paired drop; between criteria, by the smaller drop. None as well if
        a drop says nothing, see :attr:`doubt`.
        """
        if self.doubt:
            return None
        within = [p for p in self.points if p.sparsity > 0 and p.comparison.upper_bound <= self.tolerance]
        return max(within, key=lambda p: (p.model_sparsity, -p.comparison.drop), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        best = self.sweet_spot
        return {
            "format_version": FORMAT_VERSION,
            "settings": dict(self.settings),
            "parameters": self.parameters,
            "tolerance": self.tolerance,
            "confidence": self.confidence,
            "doubt": self.doubt,
            "sweet_spot": None if best is None else {"criterion": best.criterion, "sparsity": best.sparsity},
            "dense": self.dense.to_dict(),
            "points": [p.to_dict() for p in self.points],
        }

    def rows(self) -> list[dict[str, Any]]:
        """The table as flat rows, the dense model first; accuracies and drops in percent and points."""
        dense = {
            "criterion": "dense",
            "sparsity": 0.0,
            "model_sparsity": 0.0,
            "remaining": self.parameters,
            "accuracy": 100 * self.dense.accuracy,
            "standard_error": 100 * self.dense.standard_error,
            "n": self.dense.n,
            "drop": 0.0,
            "drop_standard_error": 0.0,
            "drop_low": 0.0,
            "drop_high": 0.0,
            "p_value": 1.0,
            "prune_seconds": 0.0,
        }
        return [dense] + [
            {
                "criterion": p.criterion,
                "sparsity": p.sparsity,
                "model_sparsity": p.model_sparsity,
                "remaining": p.remaining,
                "accuracy": 100 * p.evaluation.accuracy,
                "standard_error": 100 * p.evaluation.standard_error,
                "n": p.evaluation.n,
                "drop": p.comparison.drop,
                "drop_standard_error": p.comparison.drop_standard_error,
                "drop_low": p.comparison.interval[0],
                "drop_high": p.comparison.interval[1],
                "p_value": p.comparison.p_value,
                "prune_seconds": p.prune_seconds,
            }
            for p in self.points
        ]

    def to_csv(self) -> str:
        """:meth:`rows` as CSV."""
        rows = self.rows()
        return format_csv(list(rows[0]), rows)

    def __str__(self) -> str:
        cells = [
            [
                row["criterion"],
                f"{100 * row['sparsity']:g} %",
                f"{100 * row['model_sparsity']:.2f} %",
                f"{row['remaining']:,}",
                f"{row['accuracy']:.2f} %",
                "-" if row["criterion"] == "dense" else f"{row['drop']:.2f} ± {row['drop_standard_error']:.2f}",
                "-" if row["criterion"] == "dense" else f"{row['drop_low']:.2f} to {row['drop_high']:.2f}",
                "-" if row["criterion"] == "dense" else f"{row['p_value']:.2g}",
            ]
            for row in self.rows()
        ]
        percent = f"{100 * self.confidence:g} %"
        header = ["criterion", "target", "of all weights", "remaining", "accuracy", "drop ± s.e.", percent, "p"]
        where = " ".join(filter(None, [self.dense.source, self.dense.split]))
        note = (
            f"n = {self.dense.n} ({where}); drop in points against the dense model on the same examples, its standard "
            f"error and {percent} interval paired, p by McNemar's exact test."
        )
        warning = [f"Warning: {self.doubt}."] if self.doubt else []
        return "\n".join([*warning, format_table(header, cells), note, self.verdict()])

    def verdict(self) -> str:
        """One sentence that names the sweet spot, or says why there is none."""
        best, percent = self.sweet_spot, f"{100 * self.confidence:g} %"
        if best is not None:
            return (
                f"Sweet spot: {100 * best.sparsity:g} % with {best.criterion}: its measured drop is "
                f"{best.comparison.drop:.2f} points, and with {percent} confidence at most "
                f"{best.comparison.upper_bound:.2f} (tolerance {self.tolerance:g})."
            )
        if not self.points:
            return "Sweet spot: none, since nothing was pruned."
        if self.doubt:
            return f"Sweet spot: none is named, since {self.doubt}."
        lowest = min(self.points, key=lambda p: p.comparison.upper_bound)
        return (
            f"Sweet spot: none of these. The best bound is at {100 * lowest.sparsity:g} % with {lowest.criterion}: at "
            f"most {lowest.comparison.upper_bound:.2f} points with {percent} confidence, above the tolerance of "
            f"{self.tolerance:g}. Try smaller sparsities, more data, or a larger tolerance."
        )

    def write(self, folder: Path) -> list[Path]:
        """Write ``results.json``, ``results.csv`` and ``tradeoff.png``, each at once.

        Args:
            folder: Where to.

        Returns:
            The files.
        """
        files = [write_json(folder / "results.json", self.to_dict())]
        files.append(write_text(folder / "results.csv", self.to_csv()))
        where = " ".join(filter(None, [self.dense.source, self.dense.split]))
        subtitle = f"{where}, n = {self.dense.n}; bars: {100 * self.confidence:g} % interval of the paired drop"
        figure = plot_tradeoff(self.dense.accuracy, self.points, self.sweet_spot, str(self.settings["model"]), subtitle)
        files.append(save_figure(figure, folder / "tradeoff.png"))
        return files


@writes_alone("sweep")
def run_sweep(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset,
    *,
    sparsities: Iterable[float] | None = None,
    criteria: Iterable[str] = ("magnitude",),
    config: PruningConfig | None = None,
    calibration: Sequence[Mapping[str, Any]] | None = None,
    polish_data: Sequence[Mapping[str, Any]] | None = None,
    tolerance: float = 2.0,
    confidence: float = 0.95,
    out: str | os.PathLike[str] | None = None,
    restart: bool = False,
    overwrite: bool = False,
    name: str = "",
    source: str = "",
    split: str = "",
    progress: bool = False,
    **evaluation: Any,
) -> SweepResult:
    """Prune a model at several sparsities, from its dense weights each time, and score every result.

    Args:
        model: A dense sequence classifier; it is dense again afterwards.
        tokenizer: Its tokenizer.
        dataset: Labelled sentences, as for :func:`hf_prune.evaluate_classification`.
        sparsities: Shares to remove, 0 to 1; 0 is the dense model, which is always measured. By default what an N:M
            granularity fixes, or else 0.3, 0.5, 0.6, 0.7 and 0.8.
        criteria: Names of criteria.
        config: All other settings.
        calibration: Batches for criteria that need them.
        polish_data: Batches for a polish, if more or others than ``calibration``.
        tolerance: Largest accepted drop, in points of accuracy.
        confidence: Of intervals and sweet spot.
        out: Folder for ``results.json``, ``results.csv`` and ``tradeoff.png``; points that it already has are
            not measured again.
        restart: Ignore what ``out`` has.
        overwrite: Write into ``out`` also if there is something else in it; files of other names stay.
        name: What to call the model in results.
        source: Where the data is from, for results.
        split: Which split it is, for results.
        progress: Show progress bars.
        **evaluation: Passed to :func:`hf_prune.evaluate_classification`.

    Returns:
        The result.

    Raises:
        SweepError: If the model is pruned already, or ``out`` holds results of other settings, or such as were edited.
        CheckpointError: If ``out`` holds something else.
        HfPruneError: As :func:`hf_prune.prune` does, for any of the points and before the first is measured.
    """
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise SweepError(f"{out} is a file: expected a folder for the results")
    if out is not None:
        earlier = (Path(out) / "results.json").is_file()  # which is looked at below, unless it is to be replaced
        check_output(out, "sweep", overwrite=overwrite or earlier)
    base = config or PruningConfig()
    if sparsities is None:
        fixed = None if base.removes_units else parse_granularity(base.granularity).fixed_sparsity
        sparsities = DEFAULT_SPARSITIES if fixed is None else (fixed,)
    sparsities, criteria = list(dict.fromkeys(sparsities)), list(dict.fromkeys(criteria))
    configs = [base.replace(criterion=c, sparsity=float(s)) for c in criteria for s in sparsities if s != 0]
    plans = check_points(model, configs, calibration, polish_data)
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence is {confidence!r}: expected a number between 0 and 1, such as 0.95")
    parameters = sum(p.numel() for p in model.parameters())
    score: dict[str, Any] = {"source": source, "split": split, **evaluation}
    settings = _settings(model, dataset, base, calibration, polish_data, tokenizer, name, score)
    folder = None if out is None else Path(out)
    results = None if folder is None else folder / "results.json"
    found = None
    if results is not None and not restart and results.exists():
        column = score.get("label_column", "label")
        labels = class_numbers(dataset, column, model)
        known = {(plan.config.criterion, plan.config.sparsity): plan for plan in plans}

        def plan_of(point: SweepPoint) -> PruningPlan | UnitPlan:
            key = (point.criterion, point.sparsity)
            if key not in known:  # of an earlier sweep
                known[key] = prune(model, base.replace(criterion=key[0], sparsity=key[1]), dry_run=True)
            return known[key]

        fresh = {"classes": class_doubt(dataset, column, labels, model.config), "source": source, "split": split}
        found = _read(results, settings, confidence, model, labels, fresh, plan_of)
    if found is not None:
        dense, points, calibrated = found
        settings = {**settings, "calibration": settings["calibration"] or calibrated}
    else:
        points = []
        dense = evaluate_classification(model, tokenizer, dataset, **score, progress=progress and "dense")

    if doubt := doubt_of(dense, confidence):  # said before the minutes that pruning takes
        warn_user(f"{doubt}; no sweet spot will be named")

    def result() -> SweepResult:
        order = {(p.config.criterion, p.config.sparsity): i for i, p in enumerate(plans)}
        ranked = sorted(points, key=lambda p: order.get((p.criterion, p.sparsity), len(order)))
        return SweepResult(settings, parameters, dense, tuple(ranked), tolerance, confidence)

    done = {(p.criterion, p.sparsity) for p in points}
    if results is not None:
        if found is None:
            say_replaced(results.parent, FILES)
        write_json(results, result().to_dict())
    for point_config in configs:
        if (point_config.criterion, point_config.sparsity) in done:
            continue
        points.append(
            measure_point(
                model,
                tokenizer,
                dataset,
                point_config,
                calibration,
                dense,
                confidence,
                score,
                progress,
                polish_data=polish_data,
            )
        )
        if results is not None:
            write_json(results, result().to_dict())
    if folder is not None:
        result().write(folder)
    return result()


def check_points(
    model: PreTrainedModel,
    configs: Iterable[PruningConfig],
    calibration: Batches | None,
    polish_data: Batches | None = None,
) -> list[PruningPlan | UnitPlan]:
    """The plans of all points, before any is measured.

    Raises:
        SweepError: If the model is pruned already.
        HfPruneError: As :func:`hf_prune.prune` does.
    """
    if MaskStore.of(model) is not None:
        raise SweepError("the model has masks: every point is pruned from dense weights; load a dense model")
    plans = [prune(model, config, dry_run=True, polish_data=polish_data) for config in configs]
    for plan in plans if calibration is None else []:
        polished = plan.config.polish is not None and polish_data is None
        if isinstance(plan, UnitPlan):
            unit_batches(plan.config, calibration, polish_data)  # refuses
        elif plan.needs or plan.config.learns_allocation or polished:
            require_batches(plan, calibration)  # refuses
    return plans


def measure_point(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset,
    config: PruningConfig,
    calibration: Batches | None,
    dense: Evaluation,
    confidence: float,
    score: Mapping[str, Any],
    progress: bool,
    polish_data: Batches | None = None,
) -> SweepPoint:
    """Prune from the dense weights, score, and give the dense weights back.

    Args:
        model: A dense model.
        tokenizer: Its tokenizer.
        dataset: What to score.
        config: How to prune.
        calibration: Batches, if the config needs them.
        dense: The score of the dense model on the same data.
        confidence: Of the comparison with it.
        score: Options of :func:`hf_prune.evaluate_classification`.
        progress: Show progress bars.
        polish_data: Batches for a polish, if others than ``calibration``.
    """
    assert config.sparsity is not None
    start = time.perf_counter()
    try:
        prune(model, config, calibration=calibration, polish_data=polish_data, keep_dense=True, progress=progress)
        seconds = time.perf_counter() - start
        report = sparsity_report(model)
        title = f"{config.criterion} {100 * config.sparsity:g} %"
        evaluation = evaluate_classification(model, tokenizer, dataset, **score, progress=progress and title)
    finally:
        if (store := MaskStore.of(model)) is not None:
            store.discard(model)
    return SweepPoint(
        criterion=config.criterion,
        sparsity=config.sparsity,
        target_sparsity=report.target_sparsity,
        model_sparsity=report.model_sparsity,
        remaining=report.remaining,
        prune_seconds=round(seconds, 3),
        evaluation=evaluation,
        comparison=compare(dense, evaluation, confidence=confidence),
    )


def _settings(
    model: PreTrainedModel,
    dataset: Dataset,
    config: PruningConfig,
    calibration: Batches | None,
    polish_data: Batches | None,
    tokenizer: Any,
    name: str,
    score: Mapping[str, Any],
) -> dict[str, Any]:
    """What two results must share to stand in one table."""
    import transformers

    from hf_prune import __version__

    shared = config.to_dict()
    for varied in ("sparsity", "criterion"):
        shared.pop(varied)
    texts = list(score.get("text_columns", ("sentence",)))
    columns = [*texts, score.get("label_column", "label")]
    tokens = tokenizer(*(list(dataset[name])[:_TOKENIZED] for name in texts))["input_ids"]
    model_config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_SETTINGS}
    return {
        "model": name or type(model).__name__,
        "weights": weights_digest(model.named_parameters()),
        "model_config": _text_digest(model_config),
        "tokenizer": _text_digest(tokens),
        "data": fingerprint(dataset, columns),
        "n": len(dataset),
        "config": shared,
        "calibration": batches_digest(calibration),
        "polish_data": batches_digest(polish_data),
        "evaluation": {k: v for k, v in sorted(score.items()) if k not in ("source", "split")},
        "versions": {"hf_prune": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _text_digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def batches_digest(batches: Batches | None) -> str | None:
    """The :func:`weights_digest` of batches or examples, in their order; None if there are none."""
    if batches is None:
        return None
    each = ((f"{i}.{key}", x) for i, batch in enumerate(batches) for key, x in sorted(batch.items()))
    return weights_digest((name, torch.as_tensor(x)) for name, x in each)


def weights_digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A short SHA-256 over names, dtypes, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _read(
    path: Path,
    settings: Mapping[str, Any],
    confidence: float,
    model: PreTrainedModel,
    labels: list[int],
    fresh: Mapping[str, Any],
    plan_of: Callable[[SweepPoint], PruningPlan | UnitPlan],
) -> tuple[Evaluation, list[SweepPoint], str | None]:
    """Earlier results that belong to the same settings: dense score, points, and digest of their calibration.

    Anybody may have edited them: what can be counted again is, and no text of theirs is shown.
    """
    try:
        found = read_json_object(path, DataError)
        for name, kind in (("settings", dict), ("dense", dict), ("points", list)):
            if not isinstance(found.get(name), kind):
                raise DataError(f"expected an object that has {name}")
        _check_same_settings(path, found["format_version"], dict(found["settings"]), settings)
        calibrated = found["settings"].get("calibration")
        if not (calibrated is None or (isinstance(calibrated, str) and re.fullmatch("[0-9a-f]{16}", calibrated))):
            raise DataError(f"calibration is {calibrated!r}: expected 16 hexadecimal digits")
        dense = dataclasses.replace(Evaluation.from_dict(found["dense"]), **fresh)
        if dense.labels != tuple(labels):
            raise SweepError(
                f"{path} has other labels than the data: it was edited; choose another folder, or restart to measure "
                f"everything anew"
            )
        if dense.data_fingerprint != settings["data"]:
            raise DataError(
                f"data_fingerprint is {dense.data_fingerprint!r}, and that of the data {settings['data']!r}"
            )
        points = [SweepPoint.from_dict(p, dense, confidence) for p in found["points"]]
        points = [dataclasses.replace(p, evaluation=dataclasses.replace(p.evaluation, **fresh)) for p in points]
        highest = max(max(e.predictions) for e in (dense, *(p.evaluation for p in points)))
        classes = int(model.config.num_labels or 0)
        if highest >= classes:
            raise DataError(
                f"a prediction is class {highest}, and the model has {classes} classes: the file was edited"
            )
        _check_counts(points, model, plan_of)
        return dense, points, calibrated
    except SweepError:
        raise
    except (AttributeError, HfPruneError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        what = error if isinstance(error, HfPruneError) else repr(error)
        raise SweepError(f"{path} is no sweep result: {what}; choose another folder, or restart") from error


def _check_counts(
    points: Sequence[SweepPoint], model: PreTrainedModel, plan_of: Callable[[SweepPoint], PruningPlan | UnitPlan]
) -> None:
    """What a point says of its zeros must be what its pruning makes, and no point may be there twice."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for point in points:
        zeros, plan = total - point.remaining, plan_of(point)
        fits = 0 <= zeros and _is_share(point.model_sparsity, zeros, total)
        if isinstance(plan, PruningPlan):
            least, targets = plan.removed_parameters, plan.target_parameters
            there = sum(int((model.get_parameter(t.target.name) == 0).sum()) for t in plan.tensors)
            most = least + there + targets // _ROUNDED if plan.is_exact else targets
            fits = fits and least <= zeros <= most and _is_share(point.target_sparsity, zeros, targets)
        if not fits or point.model_sparsity > point.target_sparsity:
            raise DataError(
                f"remaining is {point.remaining!r}, target_sparsity {point.target_sparsity!r} and model_sparsity "
                f"{point.model_sparsity!r} at {100 * point.sparsity:g} % with {point.criterion!r}, which is not what "
                f"this pruning leaves of {total:,} parameters: the file was edited"
            )
    if len({(p.criterion, p.sparsity) for p in points}) < len(points):
        raise DataError("a criterion and sparsity is there twice: the file was edited")


def _is_share(said: float, part: int, whole: int) -> bool:
    return math.isclose(said, part / whole, rel_tol=1e-9, abs_tol=1e-12)


def _check_same_settings(path: Path, version: object, theirs: dict[str, Any], settings: Mapping[str, Any]) -> None:
    ours = json.loads(json.dumps(dict(settings)))
    if None in (theirs.get("calibration"), ours["calibration"]):  # one side had no criterion that needs it
        theirs["calibration"] = ours["calibration"] = theirs.get("calibration") or ours["calibration"]
    flat_theirs, flat_ours = _flatten(theirs), _flatten(ours)
    every = [key for key in {**flat_ours, **flat_theirs} if key != "model"]
    differing = [key for key in every if flat_theirs.get(key) != flat_ours.get(key)]
    if type(version) is not int or version != FORMAT_VERSION or differing:
        details = "; ".join(f"{key} was {flat_theirs.get(key)!r}, now {flat_ours.get(key)!r}" for key in differing)
        raise SweepError(
            f"{path} holds results of other settings ({details or f'format {version!r}'}), which cannot stand in one "
            f"table: choose another folder, or restart to measure everything anew"
        )


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One level less of nesting, so that a message names just what differs."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat
