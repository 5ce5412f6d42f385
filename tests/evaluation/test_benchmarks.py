"""Tasks of lm-eval: local ones that need no network, by the real package where it is installed."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

from hf_prune import BenchmarkScores, compare_benchmarks, evaluate_benchmarks, prune
from hf_prune.errors import ConfigError, DataError
from tests import models
from tests.evaluation.test_perplexity import sharp

TASKS = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: [w1, w2]
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITTEN = """output_type: generate_until
doc_to_target: w1
generation_kwargs: {max_gen_toks: 3, do_sample: false, until: ["w9"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a multiple-choice and a generative task of 12 examples."""
    pytest.importorskip("lm_eval", reason='lm-eval is not installed: pip install "hf_prune[lm-eval]"')
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": f"w{i} w{i + 1} w{i + 2}", "label": i % 2} for i in range(12)]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    for name, body in (("pick_word", CHOICE), ("write_word", WRITTEN)):
        (folder / f"{name}.yaml").write_text(TASKS.format(name=name, data=folder / "rows.json") + body)
    metric = "{metric: acc, aggregation: mean, weight_by_size: true}"
    (folder / "both_words.yaml").write_text(
        f"group: both_words\ntask: [pick_word, write_word]\naggregate_metric_list: [{metric}]\n"
    )
    return folder


@pytest.mark.filterwarnings("default")  # of lm-eval and what it brings
def test_local_tasks_are_paired_by_example(tasks, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    tokenizer = models.tiny_tokenizer()
    tokenizer.eos_token = "[SEP]"
    model = sharp()
    model.config.max_position_embeddings = 24
    names = ["pick_word", "write_word"]
    dense = evaluate_benchmarks(model, tokenizer, names, include_path=tasks, limit=10)
    assert [(s.task, s.metric, s.n, s.shots) for s in dense.scores] == [
        ("pick_word", "acc", 10, 0),
        ("write_word", "exact_match", 10, 0),
    ]
    assert [len(row) for row in dense.by_example] == [10, 10]
    assert dense.scores[0].value == sum(dense.by_example[0]) / 10
    assert BenchmarkScores.from_dict(json.loads(json.dumps(dense.to_dict()))) == dense
    pruned = evaluate_benchmarks(prune(model, 0.9), tokenizer, names, include_path=tasks, limit=10)
    found = compare_benchmarks(dense, pruned)
    assert found.tasks[0].change == pytest.approx(pruned.scores[0].value - dense.scores[0].value)
    assert "pick_word" in str(found)
    with pytest.raises(ConfigError, match="lm-eval has no task 'no_such_task'"):
        evaluate_benchmarks(model, tokenizer, ["no_such_task"], include_path=tasks)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(())
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    tokenizer.pad_token = None
    group = evaluate_benchmarks(model, tokenizer, ["both_words"], include_path=tasks, limit=10)
    assert (random.random(), np.random.rand(), torch.rand(())) == expected
    assert tokenizer.pad_token is None
    assert {(s.task, s.n, bool(s.data_fingerprint)) for s in group.scores} == {
        ("pick_word", 10, True),
        ("write_word", 10, True),
        ("both_words", 20, False),
    }
    assert {s.data_fingerprint for s in dense.scores} <= {s.data_fingerprint for s in group.scores}
    lines = (tasks / "rows.json").read_text().replace("w0 w1", "w7 w1")
    (tasks / "rows.json").write_text(lines)
    other = evaluate_benchmarks(model, tokenizer, names, include_path=tasks, limit=10)
    with pytest.raises(DataError, match="the results of pick_word are on different examples"):
        compare_benchmarks(dense, other)
    (tasks / "rows.json").unlink()
    with pytest.raises(DataError, match="lm-eval cannot run pick_word: "):
        evaluate_benchmarks(model, tokenizer, ["pick_word"], include_path=tasks)


def scores(*rows: tuple[float, ...]) -> BenchmarkScores:
    values = [
        {
            "task": f"t{i}",
            "metric": "acc",
            "value": sum(row) / len(row),
            "standard_error": None,
            "n": len(row),
            "shots": 0,
            "data_fingerprint": "0123456789abcdef",
        }
        for i, row in enumerate(rows)
    ]
    rest = {"version": "0.4.13", "limit": None, "seconds": 1.0, "dtype": "float32", "batch_size": 1}
    return BenchmarkScores.from_dict({"scores": values, "by_example": [list(row) for row in rows], **rest})


def test_comparison_by_hand():
    found = compare_benchmarks(scores((1, 1, 0, 1)), scores((1, 0, 0, 0))).tasks[0]
    assert found.change == -0.5
    half = 3.182446 * (1 / 3) ** 0.5 / 2  # t of 3 degrees; differences 0, -1, 0, -1 have a variance of 1/3
    assert found.interval == pytest.approx((-0.5 - half, -0.5 + half), rel=1e-5)
    other = dataclasses.replace(scores((1, 0)).scores[0], data_fingerprint="f")
    with pytest.raises(DataError, match=r"the results of t0 are on different examples \(fingerprints 0123456789abcdef"):
        compare_benchmarks(scores((1, 0)), dataclasses.replace(scores((1, 0)), scores=(other,)))
    unpaired = dataclasses.replace(scores((1, 0)), by_example=((),))
    assert compare_benchmarks(unpaired, unpaired).tasks[0].interval is None
    with pytest.raises(DataError, match="the results are of different tasks"):
        compare_benchmarks(scores((1, 0)), scores((1, 0, 1)))
    edited = {**scores((1, 0)).to_dict(), "by_example": [[1, 1]]}
    with pytest.raises(DataError, match=r"t0 has acc 0.5, and its examples give 1.0: the file was edited"):
        BenchmarkScores.from_dict(edited)


def test_what_is_missing_is_said_before_anything_runs(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="the tasks of lm-eval are \\[\\]: expected names"):
        evaluate_benchmarks(None, None, [])
    with pytest.raises(ConfigError, match="expected a folder with YAML files of tasks"):
        evaluate_benchmarks(None, None, ["a"], include_path=tmp_path / "none")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'lm-eval is not installed: pip install "hf_prune\[lm-eval\]"'):
        evaluate_benchmarks(None, None, ["a"])
