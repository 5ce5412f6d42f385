"""From checkpoint to files: what the commands do, callable from Python."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hf_prune.adoption import MIN_SPARSITY, AdoptionReport, adopt_zeros
from hf_prune.auto import load_native, load_tokenizer
from hf_prune.budget import SparsitySearch, check_budget, find_sparsity
from hf_prune.calibration_data import LabelledData, TextData
from hf_prune.checkpoint import CARD_DATA, REPORTS, copy_companions, has_tokenizer, staged_checkpoint, weight_files
from hf_prune.comparison import Comparison, compare
from hf_prune.config import PruningConfig
from hf_prune.criteria.base import LABELLED
from hf_prune.data_files import refuse_same_split
from hf_prune.data_loading import check_columns, column
from hf_prune.distributed import all_or_none, is_first, processes
from hf_prune.errors import ConfigError, DataError
from hf_prune.evaluation import Evaluation, class_numbers, drawn, evaluate_classification
from hf_prune.files import copy_beside, write_json, write_text
from hf_prune.notices import reported, warn_user
from hf_prune.outputs import check_output, source_folder, writes_alone
from hf_prune.packed_files import INDEX
from hf_prune.partial import Partial
from hf_prune.perplexity import Perplexity, evaluate_perplexity
from hf_prune.plan import PruningPlan
from hf_prune.plots import write_plots
from hf_prune.report import SparsityReport, sparsity_report, weight_histogram
from hf_prune.sites import find_sites
from hf_prune.sources import check_model_source, class_of_transformers, is_language_model, model_class
from hf_prune.stream import check_streamable, prune_stream
from hf_prune.stream_output import is_placing
from hf_prune.structures import structure_report
from hf_prune.sweep import SweepResult, run_sweep
from hf_prune.texts import text_batches, token_windows
from hf_prune.unit_plan import UnitPlan

_OTHER_INPUTS = {
    "pixel_values": "images",
    "pixel_values_videos": "videos",
    "input_features": "audio",
    "input_values": "audio",
    "input_points": "points",
}


def load_classifier(source: str) -> tuple[Any, Any]:
    """A sequence classifier and its tokenizer.

    Args:
        source: Folder or Hub id.

    Raises:
        DataError: If it cannot be found or is of another kind.
    """
    _refuse_other_kinds(source, model_class(source))
    model, tokenizer = _load(source)
    _refuse_other_kinds(source, type(model).__name__)
    return model, tokenizer


def load_language_model(source: str) -> tuple[Any, Any]:
    """A causal language model and its tokenizer.

    Args:
        source: Folder or Hub id.

    Raises:
        DataError: If it cannot be found or is of another kind.
    """
    model, tokenizer = _load(source)
    if not is_language_model(type(model).__name__):
        raise DataError(f"{source!r} is a {type(model).__name__}: expected a …ForCausalLM")
    return model, tokenizer


def _load(source: str) -> tuple[Any, Any]:
    offline = check_model_source(source)
    _refuse_other_inputs(source)
    if not has_tokenizer(source, local_files_only=offline):
        raise DataError(
            f"{source!r} has no tokenizer: save it beside the model with tokenizer.save_pretrained({source!r})"
        )
    return load_native(source), load_tokenizer(source, local_files_only=offline)


def check_reads_texts(source: str, *, labelled: bool) -> None:
    """Make sure that a checkpoint can do something with texts, before any are looked for.

    Args:
        source: Folder or Hub id.
        labelled: Whether it is to be a classifier, since their labels are asked for.

    Raises:
        DataError: If it cannot be found, reads something else, or is no classifier.
    """
    _refuse_other_inputs(source)
    if labelled:
        _refuse_other_kinds(source, model_class(source))


def _refuse_other_kinds(source: str, name: str) -> None:
    if name and not name.endswith("ForSequenceClassification"):  # without one: seen when it is loaded
        raise DataError(
            f"{source!r} is a {name}: expected a …ForSequenceClassification, which has labels and is scored by "
            f"accuracy, or a …ForCausalLM, which is scored by perplexity"
        )


def _refuse_other_inputs(source: str) -> None:
    """Make sure that a model reads texts, and texts only."""
    name = model_class(source)
    cls = class_of_transformers(name)
    if cls is None:  # code of its own, or no model: seen when it is loaded
        return
    takes = inspect.signature(cls.forward).parameters
    others = [f"{what} ({key})" for key, what in _OTHER_INPUTS.items() if key in takes]
    if others and ("input_ids" not in takes or not name.endswith("ForSequenceClassification")):
        raise DataError(
            f"{source!r} is a {name}, which learns from {' and '.join(others)}, and the commands have texts only: "
            f"prune it in Python, with calibration=batches, a list of dicts with what its processor makes of them, and "
            f"score it there, or choose a criterion without data, such as magnitude"
        )


def evaluate_checkpoint(source: str, data: LabelledData, split: str, *, batch_size: int = 32) -> Evaluation:
    """Score a sequence classifier; see :func:`hf_prune.evaluate_classification`.

    Args:
        source: Folder or Hub id.
        data: What to score it on.
        split: Which split.
        batch_size: Examples scored at once.
    """
    model, tokenizer = load_classifier(source)
    return evaluate_classification(
        model,
        tokenizer,
        data.load(split),
        text_columns=data.text_columns,
        label_column=data.label_column,
        batch_size=batch_size,
        source=data.source,
        split="" if Path(data.source).is_file() else split,
        progress=label(source),
    )


def evaluate_language_model(
    source: str,
    data: TextData,
    split: str,
    *,
    window: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> Perplexity:
    """Score a causal language model; see :func:`hf_prune.evaluate_perplexity`.

    Args:
        source: Folder or Hub id.
        data: What to score it on.
        split: Which split, where there are some.
        window: Tokens that the model sees at once; None for its context, at most 2048.
        limit: Use only the first so many windows.
        batch_size: Windows scored at once.
    """
    model, tokenizer = load_language_model(source)
    return evaluate_perplexity(
        model,
        tokenizer,
        data.load(split),
        window=window,
        limit=limit,
        batch_size=batch_size,
        source=label(data.source),
        split="" if Path(data.source).is_file() else split,
        progress=label(source),
    )


@writes_alone("prune")
@reported()
def prune_checkpoint(
    source: str,
    config: PruningConfig,
    out: Path,
    *,
    data: LabelledData | TextData | None = None,
    polish_samples: int | None = None,
    plots: bool = False,
    name: str = "",
    shrink: bool | None = None,
    overwrite: bool = False,
) -> SparsityReport:
    """Prune a checkpoint into a folder: weights, masks, tokenizer, report and, if asked for, plots.

    Args:
        source: Folder or Hub id.
        config: The settings.
        out: The folder: new, empty, or an earlier output.
        data: Labelled texts, or texts for a language model, for criteria that need them.
        polish_samples: How many of them a polish trains on; by default 4,096 labelled texts (without their labels), or
            the windows that calibration sees. Those of calibration are among them.
        plots: Also write ``weights.png`` and ``layers.png``.
        name: What to call the model in plots.
        shrink: Take out what was pruned as a whole, or leave it in, masked. None: take out heads, neurons and layers.
        overwrite: Replace what is in the way in ``out``.

    Returns:
        The report, which lies in the folder as ``sparsity_report.json``.

    Raises:
        CheckpointError: If ``out`` is the source, or something is in the way.
    """
    check_output(out, "prune", [source], overwrite=overwrite)
    join_processes()
    if polish_samples is not None and config.polish is None:
        raise ConfigError(f"polish_samples is {polish_samples}, but there is no polish: set polish, or leave it out")
    data = data if config.needs_data else None
    model, tokenizer, batches = _with_calibration(source, data, config)
    more = None if data is None else data.for_polish([config], model, tokenizer, polish_samples)
    with _pruned_into(model, source, config, out, batches, plots, name, more, shrink, overwrite) as (report, _):
        return report


def plan_checkpoint(
    source: str, config: PruningConfig, *, data: LabelledData | TextData | None = None
) -> PruningPlan | UnitPlan:
    """The plan for a checkpoint; see :meth:`hf_prune.PrunedModelMixin.plan`.

    Args:
        source: Folder or Hub id.
        config: The settings.
        data: Texts, for choices that are learned from data.
    """
    learns = config.learns_allocation or config.learns_units
    model, _, batches = _with_calibration(source, data if learns else None, config)
    plan: PruningPlan | UnitPlan = model.plan(config, calibration=batches)
    return plan


def _with_calibration(
    source: str, data: LabelledData | TextData | None, config: PruningConfig
) -> tuple[Any, Any, list[dict[str, Any]] | None]:
    """A model, and where there is data its tokenizer and its calibration batches."""
    if data is None:
        return load_native(source), None, None
    load = load_language_model if isinstance(data, TextData) else load_classifier if config.needs & LABELLED else _load
    model, tokenizer = load(source)
    return model, tokenizer, data.calibration([config], model, tokenizer)


@writes_alone("prune")
@reported()
def prune_to_budget(
    source: str,
    config: PruningConfig,
    out: Path,
    data: LabelledData,
    *,
    max_drop: float,
    held_out: int = 2000,
    split: str = "validation",
    batch_size: int = 32,
    plots: bool = False,
    name: str = "",
    overwrite: bool = False,
) -> tuple[SparsitySearch, Comparison, SparsityReport]:
    """Prune a checkpoint as far as a drop in accuracy allows, and save it as :func:`prune_checkpoint` does.

    The sparsity is found on sentences of the calibration split that neither calibration nor a polish sees; see
    :func:`hf_prune.find_sparsity`. A polish trains on up to 4,096 others, without their labels. The other split has no
    say: its score is only reported.

    Args:
        source: Folder or Hub id of a dense sequence classifier.
        config: All settings but the sparsity.
        out: The folder: new, empty, or an earlier output.
        data: Labelled texts.
        max_drop: Largest accepted drop, in points of accuracy.
        held_out: How many sentences the search scores.
        split: The split whose score is reported.
        batch_size: Examples scored at once.
        plots: Also write ``weights.png`` and ``layers.png``.
        name: What to call the model in plots.
        overwrite: Replace what is in the way in ``out``.

    Returns:
        The search and the comparison on ``split``, which lie in the folder as ``sparsity_search.json``, and the report.

    Raises:
        BudgetError: If no sparsity is within the budget; then nothing is written.
        CheckpointError: If ``out`` is the source, or something is in the way.
    """
    check_output(out, "prune", [source], overwrite=overwrite)
    check_budget(config, max_drop)
    why = "a model looks better than it is on the sentences that its sparsity was chosen on"
    refuse_same_split(data.source, split, data.calibration_split, "searched and reported on", why)
    join_processes()
    model, tokenizer = load_classifier(source)
    columns: dict[str, Any] = {"text_columns": data.text_columns, "label_column": data.label_column}
    options: dict[str, Any] = {"source": label(data.source), "batch_size": batch_size, **columns}
    reported = data.load(split)
    check_columns(reported, [*data.text_columns, data.label_column], f"the split {split!r}")
    class_numbers(data.load(data.calibration_split), data.label_column, model)  # refuses, and names rows of the data
    seen = data.seen(config, held_out)
    batches = data.calibration([config], model, tokenizer)
    more = data.for_polish([config], model, tokenizer, seen)
    search = find_sparsity(
        model,
        tokenizer,
        data.held_out(held_out, seen),
        max_drop=max_drop,
        config=config,
        calibration=batches,
        polish_data=more,
        progress=is_first(),
        split=data.calibration_split,
        **options,
    )

    def score(title: str) -> Evaluation:
        return evaluate_classification(
            model, tokenizer, reported, split=split, progress=is_first() and title, **options
        )

    dense = score(f"dense, {split}")
    made = _pruned_into(model, source, search.config, out, batches, plots, name, more, overwrite=overwrite)
    with made as (report, staging):
        comparison = compare(dense, score(f"pruned, {split}"))
        if staging is not None:
            values = {**search.to_dict(), "reported": {"split": split, **comparison.to_dict()}}
            write_json(staging / "sparsity_search.json", values)
    return search, comparison, report


@writes_alone("prune")
@reported()
def stream_checkpoint(
    source: str,
    config: PruningConfig,
    out: Path,
    *,
    data: LabelledData | TextData | None = None,
    restart: bool = False,
    overwrite: bool = False,
) -> SparsityReport:
    """Prune a checkpoint into a folder without holding its model; see :func:`hf_prune.prune_stream`.

    Args:
        source: Folder or Hub id.
        config: The settings.
        out: The folder: new, empty, or an earlier output.
        data: Texts, for criteria that learn from inputs; their labels are not looked at.
        restart: Begin anew, whatever an interrupted run left.
        overwrite: Replace what is in the way in ``out``.
    """
    check_streamable(config)
    if not is_placing(Partial(out)):  # else an earlier run had looked at it
        check_output(out, "prune", [source], overwrite=overwrite)
    batches = _streamed_batches(source, data) if config.needs and data is not None else None
    return prune_stream(source, config, out, calibration=batches, progress=True, restart=restart, overwrite=overwrite)


def _streamed_batches(source: str, data: LabelledData | TextData) -> list[dict[str, Any]]:
    """Calibration batches for a model that is not there."""
    offline = check_model_source(source)
    _refuse_other_inputs(source)
    if not has_tokenizer(source, local_files_only=offline):
        raise DataError(f"{source!r} has no tokenizer, which calibration on texts needs: save it beside the model")
    tokenizer = load_tokenizer(source, local_files_only=offline)
    if isinstance(data, TextData):
        text = AutoConfig.from_pretrained(source, local_files_only=offline, trust_remote_code=False).get_text_config()
        length = min(data.window, getattr(text, "max_position_embeddings", None) or data.window)
        return token_windows(data.load(data.calibration_split), tokenizer, n=data.calibration_samples, length=length)
    if len(data.text_columns) != 1:
        raise ConfigError(f"found {len(data.text_columns)} text columns: expected one, since streaming reads texts")
    if tokenizer.pad_token is None:  # any will do: what is padded does not count
        tokenizer.pad_token = tokenizer.eos_token
    texts = column(data.load_unlabelled(data.calibration_split), data.text_columns[0])
    return text_batches([texts[i] for i in drawn(len(texts))[: data.calibration_samples]], tokenizer)


def adopt_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    min_sparsity: float = MIN_SPARSITY,
    overwrite: bool = False,
) -> AdoptionReport:
    """Write a checkpoint, in which another tool left zeros, with masks of them; see :func:`hf_prune.adopt_zeros`.

    Args:
        source: Its folder.
        out: The folder for the new one; what lies beside the weights comes along.
        min_sparsity: Weights with a smaller share of zeros get no mask.
        overwrite: Replace what is in the way in ``out``.

    Raises:
        CheckpointError: If ``out`` is the source, or something is in the way.
    """
    source = source_folder(source)
    out = check_output(out, "migrate", [source], overwrite=overwrite)
    model = load_native(str(source))
    report = adopt_zeros(model, min_sparsity=min_sparsity)
    with staged_checkpoint(out, "migrate", overwrite=overwrite) as staging:
        model.save_pretrained(staging)
        own = [
            INDEX,
            *(path.name for path in staging.iterdir()),
            *(Path(file).name for file in weight_files(source, {})),
        ]
        left = copy_beside(source, staging, own, ["model*.safetensors*", *REPORTS, CARD_DATA])
    return dataclasses.replace(report, left={**report.left, **dict.fromkeys(left, "which was not carried over")})


def join_processes() -> None:
    """Under ``accelerate launch`` or ``torchrun``, meet the other processes, so that they calibrate together."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and processes()[1] == 1:
        from accelerate import PartialState

        PartialState(cpu=True)  # where the commands load models


@contextlib.contextmanager
def _pruned_into(
    model: Any,
    source: str,
    config: PruningConfig,
    out: Path,
    batches: list[dict[str, Any]] | None,
    plots: bool,
    name: str,
    polish_data: list[dict[str, Any]] | None = None,
    shrink: bool | None = None,
    overwrite: bool = False,
) -> Iterator[tuple[SparsityReport, Path | None]]:
    """Prune and save; the block may add files to the folder, which then appears at once.

    Of several processes only the first one writes: the others get no folder, and wait.
    """
    shrinks = config.removes_units if shrink is None else shrink
    if shrinks:
        find_sites(model)  # an error here comes before the work
    plan = model.plan(config)
    names = [t.target.name for t in plan.tensors] if isinstance(plan, PruningPlan) else plan.weights
    dense, before = sparsity_report(model, config), weight_histogram(model, names)
    model.prune(config, calibration=batches, polish_data=polish_data, progress=True)
    report = sparsity_report(model).with_before(dense)
    after = weight_histogram(model, names, limit=float(before.edges[-1])) if plots else None
    if shrinks:
        report = dataclasses.replace(report, structure=structure_report(model.shrink()))
    writes = staged_checkpoint(out, "prune", overwrite=overwrite) if is_first() else contextlib.nullcontext()
    with all_or_none(), writes as staging:
        if staging is not None:
            model.save_pretrained(staging)
            copy_companions(source, staging)
            write_text(staging / "sparsity_report.json", report.to_json())
            if after is not None:
                try:
                    write_plots(staging, report, before, after, name or label(source))
                except Exception as error:  # of whatever draws: what was pruned is not lost for a picture
                    warn_user(f"no plots, since drawing them failed ({type(error).__name__}: {error})")
        yield report, staging


@writes_alone("sweep")
def sweep_checkpoint(
    source: str,
    data: LabelledData,
    out: Path,
    *,
    sparsities: Sequence[float] | None = None,
    criteria: Sequence[str] = ("magnitude",),
    config: PruningConfig | None = None,
    split: str = "validation",
    tolerance: float = 2.0,
    batch_size: int = 32,
    restart: bool = False,
    name: str = "",
    data_name: str = "",
    overwrite: bool = False,
) -> SweepResult:
    """Sweep over a checkpoint; see :func:`hf_prune.run_sweep`.

    Args:
        source: Folder or Hub id of a dense sequence classifier.
        data: What to score and calibrate on.
        out: Folder for the results.
        sparsities: Shares to remove; see :func:`hf_prune.run_sweep` for the default.
        criteria: Names of criteria.
        config: All other settings.
        split: The split to score.
        tolerance: Largest accepted drop, in points.
        batch_size: Examples scored at once.
        restart: Measure everything anew.
        name: What to call the model in tables and plots.
        data_name: What to call the data there.
        overwrite: Replace results of other settings, or of somebody else, in ``out``.
    """
    check_output(out, "sweep", [source], overwrite=True)  # what is in it, run_sweep looks at
    configs = [(config or PruningConfig()).replace(criterion=name) for name in criteria]
    if any(each.needs_data for each in configs):
        why = "a criterion that has seen the labels that it is scored on looks better than it is"
        refuse_same_split(data.source, split, data.calibration_split, "scored and calibrated on", why)
    model, tokenizer = load_classifier(source)
    return run_sweep(
        model,
        tokenizer,
        data.load(split),
        sparsities=sparsities,
        criteria=criteria,
        config=config,
        calibration=data.calibration(configs, model, tokenizer),
        polish_data=data.for_polish(configs, model, tokenizer),
        tolerance=tolerance,
        out=out,
        restart=restart,
        name=name or label(source),
        source=data_name or label(data.source),
        split=split,
        progress=True,
        text_columns=data.text_columns,
        label_column=data.label_column,
        batch_size=batch_size,
        overwrite=overwrite,
    )


def label(source: str) -> str:
    """What to call a model or data set in tables and plots: a folder's name, or the Hub id."""
    return Path(source).resolve().name if Path(source).exists() else source
