"""What every result can do: a short text, a table with bars, a data frame, a picture."""

from __future__ import annotations

import dataclasses
import html.parser
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_prune
from hf_prune import PruningConfig, compare, describe_units, measure_latency, prunable, prune, sparsity_report
from hf_prune.conversion.compression_report import CompressionReport
from hf_prune.conversion.export import ExportReport
from hf_prune.conversion.gguf.write import GGUFReport
from hf_prune.conversion.migration import MigrationReport
from hf_prune.evaluation.accuracy_result import Evaluation, share_correct
from hf_prune.evaluation.benchmark_result import BenchmarkComparison, BenchmarkScores, TaskComparison, TaskScore
from hf_prune.evaluation.divergence import Divergence
from hf_prune.evaluation.examples.score import ExampleScore
from hf_prune.evaluation.generation_result import Generation, GenerationComparison, Sample
from hf_prune.evaluation.perplexity_result import Perplexity, PerplexityComparison
from hf_prune.evaluation.sentence_result import SentenceComparison, SentenceScore
from hf_prune.evaluation.sparsity_search import SparsitySearch
from hf_prune.evaluation.structure_report import structure_report
from hf_prune.evaluation.sweep_point import SweepPoint
from hf_prune.evaluation.sweep_result import SweepResult
from hf_prune.hub.upload import PushResult
from hf_prune.hub.verification import Difference, Verification
from hf_prune.inference.acceleration.choose import Choice
from hf_prune.inference.acceleration.layer_kinds import LayerKind
from hf_prune.inference.acceleration.report import AccelerationReport
from hf_prune.inference.timing import Ratio
from hf_prune.pruning.adopt_zeros import AdoptionReport
from hf_prune.search.point import Loss, SearchPoint
from hf_prune.search.result import SearchResult
from hf_prune.structured.hidden.trim import HiddenResult
from hf_prune.structured.vocabulary.trim import TrimResult
from hf_prune.training.lora import MergeReport
from hf_prune.training.lottery import LotteryResult, LotteryRound
from hf_prune.utils.results import Result
from tests import models

NO_TABLES = set(
    "Channels ClassificationTask Distillation ExampleTask Heads LanguageModelingTask LatencyPoint LotteryRound "
    "MaskStore Neurons Preset PruningCardData PruningConfig Schedule SentenceTask Stack UnitsOfKind WeightStats".split()
)


KEPT = ((1.0, 2.0), (2.0, 3.0))


def evaluation(right: int, n: int = 500) -> Evaluation:
    predictions = tuple(int(i >= right) for i in range(n))
    made = {"split": "dev", "source": "<b>here</b>", "data_fingerprint": "0", "seconds": 1.0, "dtype": "float32"}
    made |= {"max_length": 8, "batch_size": 32, "predictions": predictions, "labels": (0,) * n}
    return Evaluation(**made, **share_correct(predictions, (0,) * n))


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """One of every kind, of a tiny BERT where that takes no time."""
    model = prunable(models.tiny_bert())
    dense, pruned = evaluation(450), evaluation(440)
    point = SweepPoint("magnitude", 0.5, 0.5, 0.4, 100, 0.1, pruned, compare(dense, pruned))
    rounds = tuple(LotteryRound(s, {"eval_loss": 1.0}) for s in (0.0, 0.2))
    config, loss = PruningConfig(sparsity=0.5), Loss(0.3, 0.1, 0.5)
    candidate = SearchPoint("fast, 50 %", "fast", config, True, loss, 0.9, 80, 1.0, 0.5, 1.0)
    kind = LayerKind(("a", "b"), (8, 16), "float32", 0.9, (Choice(1, "sparse", 2e-3, 1e-3, 2.0),))
    found = [
        model.plan(0.5),
        model.plan(0.5, granularity=("head", "neuron")),
        describe_units(model),
        structure_report(model),
        measure_latency({"a": model, "b": model}, lengths=[4], rounds=3),
        prune(model, 0.5).sparsity_report(),
        dense,
        point,
        point.comparison,
        SweepResult({"model": "m"}, 200, dense, (point, dataclasses.replace(point, sparsity=0.6)), 2.0, 0.95),
        SparsitySearch(PruningConfig(sparsity=0.5), 3.0, 0.95, dense, (point,)),
        Divergence(0.1, 0.01, 2.0, 0.5, 3.0, 100, 0.95),
        Generation(
            0.9, 0.01, 1, 0, 4.0, 4, 8, False, ("a",), ("b",), ((1, 2, 3, 4),), "test", "here", "0", 1.0, "float32", 1
        ),
        GenerationComparison(
            3.0,
            0.5,
            1,
            0.8,
            0.1,
            0.9,
            0.8,
            -0.1,
            (-0.2, 0.0),
            0,
            0,
            4.0,
            4.0,
            2,
            4,
            0.95,
            (Sample("$a$", "b", "<c>", 1),),
        ),
        BenchmarkScores(
            (TaskScore("piqa", "acc", 0.5, 0.1, 2, 0, "0"),), ((0.0, 1.0),), "0.4.13", None, 1.0, "float32", 1
        ),
        BenchmarkComparison((TaskComparison("piqa", "acc", 0.5, 0.4, -0.1, (-0.2, 0.0), 2),), 0.95),
        Perplexity(9.0, 1, 8, None, (2.0,), (8,), 8, 8, False, 0, "test", "here", "0", 1.0, "float32", 1),
        PerplexityComparison(9.0, 10.0, 1.1, 0.01, (1.0, 1.2), 5, 0.95),
        SentenceScore("spearman", 0.8, 3, 0.1, (1.0,) * 3, (1.0,) * 3, "test", "here", "0", 1.0, "float32", 8, 1),
        SentenceComparison("spearman", 0.8, 0.7, 10.0, 1.0, (8.0, 12.0), 11.0, 0.01, 3, 0.95),
        ExampleScore(
            "regression", "Spearman", "spearman", 0.8, 2, 0.1, KEPT, "test", "here", "0", 1.0, "float32", 8, 1
        ),
        CompressionReport(200, 100),
        ExportReport(Path("a.onnx"), "onnxruntime", 1e-6),
        ExportReport(Path("b.onnx"), "onnxruntime", 1e-6, "int8", 1e-2, 0.5, 400, 100),
        GGUFReport(Path("a.gguf"), "llama", "q8_0", 100, 0, 1, 1e-3, True, 8),
        MigrationReport(3, ("torch.nn.utils.prune",), 0, ()),
        AdoptionReport({"a.weight": 0.5, "b.weight": 0.25}, 3, 8, {}),
        PushResult("me/it", {"config.json": 10, "model.safetensors": 99}, (), (), None, None, None),
        Verification("here", (Difference("zeros", 3, 3), Difference("n", 4, 5))),
        HiddenResult("LlamaForCausalLM", 8, (0, 2, 3, 5), 100, 60, 1e-7),
        TrimResult(None, None, {}, 10, 100, 80, 400, 320, 5, 50, 0, True),
        MergeReport(None, 0.5, 0.9),
        candidate,
        SearchResult("smaller", 1.0, "points", "here", {"model": "$m$"}, 0.9, 100, (candidate,)),
        LotteryResult(None, {}, rounds),
        AccelerationReport((kind,), Ratio(2.0, 1.9, 2.1), 2.0, 1.0, 0.0, 100, 20, 1, 8, 1, {"cpu": "x"}),
    ]
    return {type(result).__name__: result for result in found}


def test_every_public_result_is_one(results):
    public = {name: getattr(hf_prune, name) for name in hf_prune.__all__}
    classes = {name: value for name, value in public.items() if dataclasses.is_dataclass(value)}
    assert {name for name, cls in classes.items() if not issubclass(cls, Result)} == NO_TABLES
    assert {name for name, cls in classes.items() if issubclass(cls, Result)} <= set(results)


class Checker(html.parser.HTMLParser):
    """Sees that tags are closed in turn, and which there are."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_texts_are_short_and_tables_are_whole(results):
    for name, result in results.items():
        assert len(repr(result).splitlines()) <= 10, name
        assert len(repr(result)) < 2000, name
        assert repr(result).splitlines()[0] == str(result).splitlines()[0]
        checker = Checker()
        checker.feed(result._repr_html_())
        assert checker.open == []
        assert len(result._repr_html_()) < 40_000
        frame = result.to_pandas()
        assert len(frame) == len(result.rows()) >= 1, name
        assert list(frame.columns) == list(result.rows()[0])
        if name == "Verification":
            with pytest.raises(ValueError, match="Verification has no numbers to draw: print it"):
                result.plot()
        else:
            figure = result.plot()
            figure.canvas.draw()
            assert figure.axes[0].containers


def test_long_texts_say_what_is_left_out(results):
    text, whole = repr(results["SparsityReport"]).splitlines(), str(results["SparsityReport"]).splitlines()
    assert len(text) == 10
    assert text[3] == f"… {len(whole) - 9} more lines: print() shows them"
    assert [*text[:3], *text[4:]] == [*whole[:3], *whole[-6:]]


def test_tables_have_bars_and_escape_names(results):
    shown = results["SparsityReport"]._repr_html_()
    assert shown.count("<tr>") == 1 + len(results["SparsityReport"].targets)
    assert "linear-gradient(to right,rgba(0,114,178,.35) 100.0%" in shown
    assert "<b>here</b>" not in results["Evaluation"]._repr_html_()
    assert "&lt;b&gt;here&lt;/b&gt;" in results["Evaluation"]._repr_html_()


def test_a_long_table_ends_with_what_is_left_out():
    layers = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(50)])
    shown = sparsity_report(prune(layers, 0.5))._repr_html_()
    assert shown.count("<tr>") == 41
    assert "… and 10 more rows: to_pandas() has them" in shown


def test_pandas_has_nested_values_as_columns(results):
    frame = results["SparsityReport"].to_pandas()
    assert frame["sparsity"].tolist() == pytest.approx([0.5] * len(frame), abs=0.01)
    assert {"name", "shape", "after.std"} <= set(frame.columns)
    assert "predictions" not in results["Evaluation"].to_pandas()


@pytest.mark.parametrize("function", [prune, hf_prune.PrunedModelMixin.prune, hf_prune.PrunedModelMixin.plan])
def test_settings_are_arguments_that_shells_complete(function):
    parameters = inspect.signature(function).parameters
    for field in dataclasses.fields(PruningConfig):
        default = parameters[field.name].default
        by_preset = field.name in ("criterion", "allocation", "repair", "objective")
        assert repr(default) == "<of the preset>" if by_preset else default == field.default
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert f"\n{field.name}: " in inspect.cleandoc(function.__doc__).replace("    ", "")
    assert "config" in parameters
    assert "settings" not in parameters
