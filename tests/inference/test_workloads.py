"""What models are timed on: made up or given, the same for all, or refused before anything is timed."""

import json
from types import SimpleNamespace

import pytest
import torch

from hf_prune import ConfigError, PlanError, measure_latency
from hf_prune.hub.card_speed import speed_text
from hf_prune.inference.backends import ExportedModel
from hf_prune.inference.speedup import measured_speedup, workload_inputs
from hf_prune.inference.timing import Timings
from hf_prune.inference.workloads import find_workloads
from tests import models as tiny


def no_timing(runs, *, rounds, **_):
    """A second for each round of each, without running anything."""
    return {name: Timings((1.0,) * rounds, (1.0,) * rounds) for name in runs}


@pytest.fixture(autouse=True)
def _nothing_is_timed(monkeypatch):
    monkeypatch.setattr("hf_prune.inference.latency.time_together", no_timing)


def test_tokens_are_those_that_all_models_know():
    models = {"large": tiny.tiny_bert(), "small": tiny.tiny_bert(vocab_size=7)}
    (first,) = find_workloads(models, None, [3], [16])
    (again,) = find_workloads(models, None, [3], [16])
    ids = first.inputs["input_ids"]
    assert ids.shape == (3, 16)
    assert 0 < ids.min() <= ids.max() < 7
    assert torch.equal(ids, again.inputs["input_ids"])
    assert torch.equal(first.inputs["attention_mask"], torch.ones_like(ids))


def test_a_grid_of_batches_and_lengths():
    found = find_workloads({"a": tiny.tiny_bert()}, None, [1, 2], [4, 8])
    assert [(w.batch_size, w.length) for w in found] == [(1, 4), (1, 8), (2, 4), (2, 8)]


@pytest.mark.parametrize("build", [tiny.tiny_vit, tiny.tiny_resnet])
def test_images_have_no_tokens(build):
    result = measure_latency({"a": build()}, batch_sizes=[1, 2], lengths=[4, 8], rounds=2)
    assert [(p.batch_size, p.length, p.tokens_per_second) for p in result.points] == [(1, 0, None), (2, 0, None)]
    assert [p.workload for p in result.points] == ["forward, batch of 1", "forward, batch of 2"]


@pytest.mark.parametrize(("build", "size"), [(tiny.tiny_vit, "batch of 2"), (tiny.tiny_bert, "batch 2 x 8")])
def test_the_record_of_a_speed_up_names_tokens_only_where_there_are_some(build, size, monkeypatch):
    monkeypatch.setattr("hf_prune.inference.speedup.time_together", no_timing)
    model, workload = build().eval(), {"batch_size": 2, "length": 8}
    record = measured_speedup(model, build().eval(), workload_inputs(model, workload), workload)
    assert record.workload == size
    facts = SimpleNamespace(report={"structure": {"speed": record.to_dict()}}, latency=None, acceleration=None)
    assert f" ({size}{' tokens' if 'x' in size else ''}, float32, cpu, " in speed_text(facts, str)


def test_inputs_of_ones_own():
    model = tiny.mlp()
    (point,) = measure_latency({"a": model}, {"x": torch.ones(5, 8)}, rounds=2).points
    assert (point.batch_size, point.length, point.tokens_per_second) == (5, 0, None)
    ids = torch.ones(2, 6, dtype=torch.long)
    (point,) = measure_latency({"a": tiny.tiny_bert()}, {"input_ids": ids}, rounds=2).points
    assert (point.batch_size, point.length, point.tokens_per_second) == (2, 6, 12.0)


def refusals():
    bert, short = tiny.tiny_bert(), tiny.tiny_bert(max_position_embeddings=12)
    sound = tiny.tiny_bert()
    sound.main_input_name = "input_values"
    vit, larger = tiny.tiny_vit(), tiny.tiny_vit(image_size=64)
    return {
        "no config": ({"a": tiny.mlp()}, {}, PlanError, "a is a MLP without a config.*pass inputs="),
        "unknown inputs": ({"a": sound}, {}, PlanError, "a: .*takes 'input_values'.*inputs= of measure_latency"),
        "positions": ({"a": bert, "b": short}, {"lengths": [16]}, PlanError, "b: .* longer than the 12 positions"),
        "sizes": ({"a": vit, "b": larger}, {}, ConfigError, "dtypes, devices or inputs cannot be compared"),
        "kinds": ({"a": bert, "b": tiny.tiny_t5()}, {"lengths": [8]}, ConfigError, "inputs cannot be compared"),
        "no tensor": ({"a": bert}, {"inputs": {"x": 1}}, ConfigError, "inputs= holds no tensor: found {'x': 1}"),
        "wrong inputs": (
            {"a": bert},
            {"inputs": {"y": torch.ones(2, 3)}},
            PlanError,
            r"a does not run on {'y': \(2, 3\)} \(ValueError: .*pass inputs=",
        ),
        "encoder": ({"a": bert}, {"lengths": [8], "new_tokens": 2}, ConfigError, "language models, which a is not"),
        "seq2seq": (
            {"a": tiny.tiny_t5()},
            {"lengths": [8], "new_tokens": 2},
            ConfigError,
            "new_tokens=2 is for causal language models, which a is not",
        ),
        "long": (
            {"a": tiny.tiny_gpt2()},
            {"lengths": [8, 16], "new_tokens": 9},
            ConfigError,
            "a prompt of 16 tokens and 9 new ones are more than the 24 positions of a",
        ),
        "negative": ({"a": bert}, {"new_tokens": -1}, ConfigError, "new_tokens is -1: expected at least 0"),
        "warmup": ({"a": bert}, {"warmup": -1}, ConfigError, "warmup is -1: expected at least 0"),
    }


@pytest.mark.parametrize("case", refusals())
def test_what_cannot_be_timed_is_refused(case):
    models, settings, kind, message = refusals()[case]
    for model in models.values():
        model.train()
    threads = torch.get_num_threads()
    with pytest.raises(kind, match=message):
        measure_latency(models, **{"rounds": 2, "threads": threads + 1, **settings})
    assert torch.get_num_threads() == threads
    assert all(module.training for model in models.values() for module in model.modules())


def test_exported_models_are_compared_in_float32_on_the_cpu_only():
    model = tiny.tiny_bert().to(torch.bfloat16)
    with pytest.raises(
        ConfigError, match=r"m\.onnx is exported, in float32 on the CPU, and the others are in bfloat16"
    ):
        measure_latency({"a": model, "m.onnx": object.__new__(ExportedModel)}, lengths=[8])


def test_too_few_rounds_are_told_and_are_json():
    models = {"dense": tiny.tiny_bert(), "other": tiny.tiny_bert(1)}
    result = measure_latency(models, lengths=[8], rounds=3)
    assert result.points[1].verdict == "too few rounds"
    assert (
        "other and dense are not told apart at forward, 1 x 8 tokens (too few rounds for an interval, which takes six)."
        in str(result).splitlines()
    )
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["points"][1]["against"] == {"value": 1.0, "low": 0.0, "high": None, "is_real": False}


def test_every_model_makes_as_many_tokens():
    """Every token that is made ends a text, if texts may end: with a minimum, none does."""
    model = tiny.tiny_llama(eos_token_id=list(range(tiny.VOCAB - 1)), pad_token_id=0)
    lengths = []
    original = model.generate

    def generate(**settings):
        lengths.append(original(**settings).shape[1])

    model.generate = generate
    from hf_prune.inference.latency import _generation

    ids = torch.ones(2, 4, dtype=torch.long)
    _generation(model, {"input_ids": ids, "attention_mask": ids}, 5)()
    assert lengths == [9]
