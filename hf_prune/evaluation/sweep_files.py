"""Continue an interrupted sweep: compare its settings, and read and check the points that it has measured."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_prune.calibration.batches import Batches
from hf_prune.errors import DataError, HfPruneError, SweepError
from hf_prune.evaluation.accuracy_result import Evaluation
from hf_prune.evaluation.scores import Score, data_identity, read_score
from hf_prune.evaluation.sweep_point import SweepPoint
from hf_prune.evaluation.sweep_result import FORMAT_VERSION
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.planning.config import PruningConfig
from hf_prune.planning.plan import PruningPlan
from hf_prune.structured.unit_plan import UnitPlan
from hf_prune.utils.digests import examples_digest, tensors_digest
from hf_prune.utils.json_files import read_json_object
from hf_prune.utils.wrapping import sole_model

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

_ROUNDED = 1000  # one in this many weights may become zero because a repair rounds it
# fields of a model's config that say where it came from, or that a forward pass with labels fills in
_NOT_SETTINGS = ("_name_or_path", "transformers_version", "architectures", "problem_type")


def sweep_settings(
    model: PreTrainedModel,
    dataset: Dataset,
    config: PruningConfig,
    calibration: Batches | None,
    polish_data: Batches | None,
    tokenizer: Any,
    name: str,
    score: Mapping[str, Any],
) -> dict[str, Any]:
    """The settings that results must share to stand in one table."""
    import transformers

    from hf_prune import __version__

    shared = config.to_dict()
    for varied in ("sparsity", "criterion"):
        shared.pop(varied)
    model_config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_SETTINGS}
    return {
        "model": name or type(model).__name__,
        "weights": tensors_digest(model.named_parameters()),
        "model_config": _text_digest(model_config),
        **data_identity(model, tokenizer, dataset, score),
        "n": len(dataset),
        "config": shared,
        "calibration": examples_digest(calibration),
        "polish_data": examples_digest(polish_data),
        "evaluation": {k: v for k, v in sorted(score.items()) if k not in ("source", "split")},
        "versions": {"hf_prune": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _text_digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_is_sweep(path: Path) -> bool:
    """Make sure that a file is the result of a sweep, of whatever settings, which a new sweep may replace.

    Raises:
        SweepError: If it is not.
    """
    try:
        values = read_json_object(path, DataError)
        if not isinstance(values.get("points"), list) or not isinstance(values.get("settings"), dict):
            raise DataError("expected an object with settings and points")
        if "dense" not in values:
            raise DataError("expected an object with the score of the dense model")
    except DataError as error:
        raise SweepError(
            f"{path} is not the result of a sweep: {error}; choose another folder, or pass --overwrite "
            f"(overwrite=True) to replace it"
        ) from error
    return True


def read_results(
    path: Path,
    settings: Mapping[str, Any],
    confidence: float,
    model: PreTrainedModel,
    truth: Mapping[str, Any],
    fresh: Mapping[str, Any],
    plan_of: Callable[[SweepPoint], PruningPlan | UnitPlan],
) -> tuple[Score, list[SweepPoint], str | None, AccelerationReport | None]:
    """Read the results of an earlier sweep with the same settings.

    The file may have been edited: what can be counted is counted again, and texts in it are replaced by ``fresh``.

    Args:
        path: ``results.json``.
        settings: The settings of this sweep.
        confidence: Confidence of the comparisons.
        model: The dense model.
        truth: What scores must say of the data, see :func:`hf_prune.evaluation.scores.known_truth`.
        fresh: Texts of the scores, as this sweep knows them.
        plan_of: Makes the plan of a point.

    Returns:
        The dense score, the points, the digest of their calibration data, and what kernels bring the dense model.

    Raises:
        SweepError: If the results are of other settings, or damaged or edited.
    """
    try:
        values = read_json_object(path, DataError)
        for name, kind in (("settings", dict), ("dense", dict), ("points", list)):
            if not isinstance(values.get(name), kind):
                raise DataError(f"expected an object that has {name}")
        _check_same_settings(path, values["format_version"], dict(values["settings"]), settings)
        calibrated = values["settings"].get("calibration")
        if not (calibrated is None or (isinstance(calibrated, str) and re.fullmatch("[0-9a-f]{16}", calibrated))):
            raise DataError(f"calibration is {calibrated!r}: expected 16 hexadecimal digits")
        dense = dataclasses.replace(read_score(values["dense"]), **fresh)
        if any(getattr(dense, name, None) != value for name, value in truth.items()):
            raise SweepError(
                f"{path} has other labels than the data: it was edited; choose another folder, or restart to measure "
                f"everything again"
            )
        if dense.data_fingerprint != settings["data"]:
            raise DataError(
                f"data_fingerprint is {dense.data_fingerprint!r}, and that of the data {settings['data']!r}"
            )
        points = [SweepPoint.from_dict(p, dense, confidence) for p in values["points"]]
        points = [dataclasses.replace(p, evaluation=dataclasses.replace(p.evaluation, **fresh)) for p in points]
        _check_classes([dense, *(p.evaluation for p in points)], model)
        _check_counts(points, model, plan_of)
        saved = values.get("dense_acceleration")
        return dense, points, calibrated, None if saved is None else AccelerationReport.from_dict(saved)
    except SweepError:
        raise
    except (AttributeError, HfPruneError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        what = error if isinstance(error, HfPruneError) else repr(error)
        raise SweepError(f"{path} is not a sweep result: {what}; choose another folder, or restart") from error


def _check_classes(scores: Sequence[Score], model: PreTrainedModel) -> None:
    predicted = [score.predictions for score in scores if isinstance(score, Evaluation)]
    highest, classes = max(map(max, predicted), default=-1), int(model.config.num_labels or 0)
    if highest >= classes:
        raise DataError(f"a prediction is class {highest}, and the model has {classes} classes: the file was edited")


def _check_counts(
    points: Sequence[SweepPoint], model: PreTrainedModel, plan_of: Callable[[SweepPoint], PruningPlan | UnitPlan]
) -> None:
    """Make sure that the zeros of each point are those of its pruning, and that there are no duplicates.

    Raises:
        DataError: If not.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    for point in points:
        zeros, plan = total - point.remaining, plan_of(point)
        fits = 0 <= zeros and _is_share(point.model_sparsity, zeros, total)
        if isinstance(plan, PruningPlan):
            least, targets = plan.removed_parameters, plan.target_parameters
            pruned = sole_model(model)
            zeros_before = sum(int((pruned.get_parameter(t.target.name) == 0).sum()) for t in plan.tensors)
            most = least + zeros_before + targets // _ROUNDED if plan.is_exact else targets
            fits = fits and least <= zeros <= most and _is_share(point.target_sparsity, zeros, targets)
        if not fits or point.model_sparsity > point.target_sparsity:
            raise DataError(
                f"remaining is {point.remaining!r}, target_sparsity {point.target_sparsity!r} and model_sparsity "
                f"{point.model_sparsity!r} at {100 * point.sparsity:g} % with {point.criterion!r}, which is not what "
                f"this pruning leaves of {total:,} parameters: the file was edited"
            )
    if len({(p.criterion, p.sparsity) for p in points}) < len(points):
        raise DataError("a criterion and sparsity occurs twice: the file was edited")


def _is_share(claimed: float, part: int, whole: int) -> bool:
    return math.isclose(claimed, part / whole, rel_tol=1e-9, abs_tol=1e-12)


def _check_same_settings(path: Path, version: object, theirs: dict[str, Any], settings: Mapping[str, Any]) -> None:
    ours = json.loads(json.dumps(dict(settings)))
    if None in (theirs.get("calibration"), ours["calibration"]):  # one side had no criterion that needs it
        theirs["calibration"] = ours["calibration"] = theirs.get("calibration") or ours["calibration"]
    flat_theirs, flat_ours = _flatten(theirs), _flatten(ours)
    keys = [key for key in {**flat_ours, **flat_theirs} if key != "model"]
    differing = [key for key in keys if flat_theirs.get(key) != flat_ours.get(key)]
    if type(version) is not int or version != FORMAT_VERSION or differing:
        details = "; ".join(f"{key} was {flat_theirs.get(key)!r}, now {flat_ours.get(key)!r}" for key in differing)
        raise SweepError(
            f"{path} holds results of other settings ({details or f'format {version!r}'}), which cannot stand in one "
            f"table: choose another folder, or restart to measure everything again"
        )


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One level less of nesting, so that a message names just what differs."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return flat
