"""Exported files do what PyTorch does, masked and shrunk."""

import importlib.util
import json
import os
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import MambaConfig, MambaForCausalLM, RobertaConfig, RobertaForSequenceClassification

from hf_prune import ExportError, export_model, measure_latency, prune, shrink
from hf_prune.architectures.bypass import bypass
from hf_prune.errors import CheckpointError, ConfigError, DataError
from hf_prune.inference.backends import ExportedModel
from tests.architecture_models import tiny
from tests.moe_models import tiny_mixture
from tests.support.command_line import exit_code


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits.numpy()


@pytest.mark.parametrize(
    ("model_type", "suffix"),
    [
        ("bert", ".onnx"),
        pytest.param("bert", ".xml", marks=pytest.mark.matrix),
        pytest.param("llama", ".onnx", marks=pytest.mark.matrix),
    ],
)
def test_masked_and_shrunk_models_do_the_same_there(model_type, suffix, tmp_path):
    model, inputs = tiny(model_type)
    given = {k: v[:, 2:] if model_type == "llama" else v for k, v in inputs().items()}  # rows of padding are arbitrary
    prune(model, 0.5, granularity=("head", "neuron"))
    masked = export_model(model, tmp_path / f"masked{suffix}")
    shrink(model)
    shrunk = export_model(model, tmp_path / f"shrunk{suffix}")
    assert masked.difference < 1e-5
    assert shrunk.difference < 1e-5
    one = {k: v[:1] for k, v in given.items()}  # of another batch size than it was exported with
    expected = logits(model, one)
    for report in (masked, shrunk):
        assert abs(ExportedModel(report.path, threads=1)(**one) - expected).max() < 1e-5
    sizes = [sum(f.stat().st_size for f in tmp_path.glob(f"{name}.*")) for name in ("masked", "shrunk")]
    assert sizes[1] < sizes[0]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert model.config._attn_implementation == "sdpa"


def test_int8_files_are_smaller_nearly_the_same_and_keep_their_zeros(tmp_path, capsys):
    model, inputs = tiny("bert")
    prune(model, 0.5)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "files" / "m.onnx"
    assert exit_code("export", tmp_path / "model", out, "--quantize", "int8", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert os.listdir(out.parent) == ["m.onnx"]
    assert report["bytes"] == out.stat().st_size < report["float_bytes"]
    assert report["difference"] < 1e-5
    assert 1e-5 < report["quantized_difference"] < 0.1 * report["largest_output"]
    assert abs(ExportedModel(out)(**inputs()) - logits(model, inputs())).max() < 0.1 * report["largest_output"]
    graph = onnx.load(out).graph
    stored = [numpy_helper.to_array(tensor) for tensor in graph.initializer if "word_embeddings" in tensor.name]
    embedding = tuple(model.bert.embeddings.word_embeddings.weight.shape)
    assert [array.dtype for array in stored if array.shape == embedding] == [np.uint8]
    weight = model.bert.encoder.layer[0].intermediate.dense.weight.detach().numpy().T
    matrices = [numpy_helper.to_array(tensor) for tensor in graph.initializer if list(tensor.dims) == [*weight.shape]]
    rounded = next(array for array in matrices if not array[weight == 0].any())
    assert rounded.dtype == np.int8
    scale = abs(weight).max(0) / 64  # (outputs,); seven bits
    assert abs(rounded * scale - weight).max() <= 0.51 * scale.max()


def test_int8_that_cannot_be_written_is_refused(tmp_path, monkeypatch, capsys):
    model, _ = tiny("bert")
    with pytest.raises(ExportError, match=r"quantize is 'int4': expected None or one of 'int8'"):
        export_model(model, tmp_path / "m.onnx", quantize="int4")
    model.save_pretrained(tmp_path / "model")
    assert exit_code("export", tmp_path / "model", tmp_path / "m.gguf", "--quantize", "int8") == 1
    assert "choose --gguf-type q8_0" in capsys.readouterr().err
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "nncf" else find(name))
    with pytest.raises(ExportError, match=r"nncf is not installed, .*: pip install nncf, or export to \.onnx"):
        export_model(model, tmp_path / "m.xml", quantize="int8")
    monkeypatch.undo()

    def overflowing(source, target):
        broken = onnx.load(source)
        for tensor in broken.graph.initializer:
            if tensor.name.endswith("classifier.bias"):
                tensor.CopyFrom(numpy_helper.from_array(np.full(tuple(tensor.dims), np.inf, np.float32), tensor.name))
        onnx.save(broken, target)

    monkeypatch.setattr("hf_prune.conversion.export.write_int8", overflowing)
    with pytest.raises(
        ExportError, match="outputs of the int8 model in onnxruntime are not finite: nothing was written"
    ):
        export_model(model, tmp_path / "m.onnx", quantize="int8")
    assert os.listdir(tmp_path) == ["model"]


def test_openvino_files_in_int8(tmp_path):
    pytest.importorskip("nncf", reason="nncf is not installed, which quantizes OpenVINO files")
    model, inputs = tiny("bert")
    report = export_model(model, tmp_path / "m.xml", quantize="int8")
    assert report.bytes < report.float_bytes
    assert sorted(os.listdir(tmp_path)) == ["m.bin", "m.xml"]
    assert 1e-6 < report.quantized_difference < 0.1 * report.largest_output
    assert abs(ExportedModel(report.path)(**inputs()) - logits(model, inputs())).max() < 0.1 * report.largest_output


def test_models_exported_by_the_command_are_timed_beside_checkpoints(tmp_path, capsys):
    model, _ = tiny("bert")
    model.save_pretrained(tmp_path / "model")
    assert exit_code("export", tmp_path / "model", tmp_path / "m.onnx") == 0
    assert "its outputs differ from PyTorch's by" in capsys.readouterr().out
    exported = ExportedModel(tmp_path / "m.onnx")
    result = measure_latency({"torch": model, "onnx": exported}, lengths=[8], rounds=6, warmup=1)
    assert [point.model for point in result.points] == ["torch", "onnx"]
    with pytest.raises(ConfigError, match="name a checkpoint first"):
        measure_latency({"onnx": exported})
    assert exit_code("bench", tmp_path / "model", tmp_path / "m.onnx", "--length", "8", "--rounds", "3", "--json") == 0
    assert [p["model"] for p in json.loads(capsys.readouterr().out)["points"]] == ["model", "m.onnx"]


def greedy(model, ids, new_tokens):
    """Each token from all before it, without a cache; generate() would leave out the token that ends a text."""
    for _ in range(new_tokens):
        ids = torch.cat([ids, torch.from_numpy(logits(model, {"input_ids": ids})[:, -1:].argmax(-1))], 1)
    return ids.numpy()


@pytest.mark.parametrize("suffix", [".onnx", pytest.param(".xml", marks=pytest.mark.matrix)])
def test_a_key_value_cache_generates_what_pytorch_does(suffix, tmp_path):
    """Of a model whose layers have different numbers of heads; prompts may be of other sizes than in the export."""
    model, inputs = tiny("llama", num_key_value_heads=4)
    prune(model, 0.4, granularity=("head", "neuron"), scope="global")
    shrink(model)
    heads = [layer.self_attn.k_proj.out_features for layer in model.model.layers]
    assert len(set(heads)) > 1
    report = export_model(model, tmp_path / f"m{suffix}", cache=True)
    assert report.difference < 1e-5
    exported = ExportedModel(report.path, threads=1)
    assert exported.has_cache
    ids = inputs()["input_ids"][:, 2:]
    for prompts in (ids, ids[:1, :3]):
        assert (exported.generate(prompts, 7) == greedy(model, prompts, 7)).all()
    assert abs(exported(input_ids=ids) - logits(model, {"input_ids": ids})).max() < 1e-5  # a whole batch at once


def test_the_tensors_of_a_cache_have_the_names_of_optimum_and_padding_on_the_left_is_masked(tmp_path):
    model, inputs = tiny("llama")
    export_model(model, tmp_path / "m.onnx", cache=True)
    graph = onnx.load(tmp_path / "m.onnx").graph
    tokens = ["input_ids", "attention_mask", "position_ids"]
    sides = [f"{i}.{side}" for i in range(len(model.model.layers)) for side in ("key", "value")]
    assert [value.name for value in graph.input] == [*tokens, *(f"past_key_values.{side}" for side in sides)]
    assert [value.name for value in graph.output] == ["logits", *(f"present.{side}" for side in sides)]
    exported = ExportedModel(tmp_path / "m.onnx")
    ids = inputs()["input_ids"][:, 2:]
    padded = {
        "input_ids": torch.cat([torch.zeros_like(ids[:, :2]), ids], 1),
        "attention_mask": torch.tensor([[0, 0] + [1] * ids.shape[1]] * len(ids)),
        "position_ids": torch.tensor([[0, 0, *range(ids.shape[1])]] * len(ids)),
    }
    assert abs(exported(**padded)[:, 2:] - logits(model, {"input_ids": ids})).max() < 1e-5


def test_experts_are_exported(tmp_path):
    model = tiny_mixture("mixtral")
    assert export_model(model, tmp_path / "m.onnx", cache=True).difference < 1e-5
    assert model.config._experts_implementation != "batched_mm"


def test_windows_that_slide_and_int8(tmp_path):
    """The prompt is longer than the window, and so is what follows."""
    model, inputs = tiny("mistral", sliding_window=3)
    report = export_model(model, tmp_path / "m.onnx", cache=True)
    ids = inputs()["input_ids"][:, 2:]
    assert ids.shape[1] > 3
    assert (ExportedModel(report.path).generate(ids, 6) == greedy(model, ids, 6)).all()
    small = export_model(model, tmp_path / "small.onnx", cache=True, quantize="int8")
    assert small.difference < 1e-5
    assert 1e-5 < small.quantized_difference < 0.1 * small.largest_output
    assert ExportedModel(small.path).generate(ids, 6).shape == (len(ids), ids.shape[1] + 6)


def test_a_layer_without_heads_is_exported_to_onnx_and_refused_by_openvino(tmp_path):
    model, inputs = tiny("llama", num_key_value_heads=4)
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            linear.weight.mul_(1e-6)
    prune(model, 0.34, granularity="head", scope="global", criterion="magnitude")
    shrink(model)
    assert attention.k_proj.out_features == 0
    report = export_model(model, tmp_path / "m.onnx", cache=True)
    ids = inputs()["input_ids"][:, 2:]
    assert (ExportedModel(report.path).generate(ids, 4) == greedy(model, ids, 4)).all()
    with pytest.raises(
        ExportError, match=r"OpenVINO cannot convert this model: a layer has no heads.*export it to \.onnx"
    ):
        export_model(model, tmp_path / "m.xml")
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_files_of_others_with_several_outputs_give_their_first(tmp_path):
    value = partial(helper.make_tensor_value_info, elem_type=TensorProto.INT64, shape=["batch", "tokens"])
    nodes = [helper.make_node("Abs", ["input_ids"], ["a"]), helper.make_node("Neg", ["input_ids"], ["b"])]
    graph = helper.make_graph(nodes, "two", [value("input_ids")], [value("a"), value("b")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "m.onnx")
    ids = torch.ones(2, 3, dtype=torch.long)
    assert (ExportedModel(tmp_path / "m.onnx")(input_ids=ids) == 1).all()


def test_models_without_keys_and_values_are_refused_a_cache(tmp_path, capsys):
    with pytest.raises(ExportError, match=r"does not continue a text.*leave cache=True \(--cache\) out"):
        export_model(tiny("bert")[0], tmp_path / "m.onnx", cache=True)
    config = MambaConfig(vocab_size=99, hidden_size=16, state_size=4, num_hidden_layers=2)
    with pytest.raises(ExportError, match="MambaForCausalLM keeps something other than keys and values of each layer"):
        export_model(MambaForCausalLM(config), tmp_path / "m.onnx", cache=True)
    tiny("llama")[0].save_pretrained(tmp_path / "model")
    assert exit_code("export", tmp_path / "model", tmp_path / "m.gguf", "--cache") == 1
    assert "--cache is for FILE.onnx and FILE.xml" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["model"]


def test_generation_with_a_cache_is_timed_and_without_one_refused(tmp_path, capsys):
    model, inputs = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    for name, options in (("with", ["--cache"]), ("without", [])):
        assert exit_code("export", tmp_path / "model", tmp_path / f"{name}.onnx", *options) == 0
    capsys.readouterr()
    files = [tmp_path / name for name in ("model", "with.onnx", "without.onnx")]
    assert exit_code("bench", *files, "--length", 8, "--rounds", 3, "--new-tokens", 4, "--json") == 0
    timed = [(p["model"], p["task"]) for p in json.loads(capsys.readouterr().out)["points"]]
    assert ("with.onnx", "generate") in timed
    assert ("without.onnx", "generate") not in timed
    with pytest.raises(ExportError, match=r"without\.onnx has no key-value cache.*hf-prune export --cache"):
        ExportedModel(tmp_path / "without.onnx").generate(inputs()["input_ids"], 2)


def test_refusals_write_nothing(tmp_path, monkeypatch):
    model, _ = tiny("bert")
    with pytest.raises(ExportError, match=r"ends in '\.bin': expected \.onnx"):
        export_model(model, tmp_path / "m.bin")
    with pytest.raises(ExportError, match=r"not in float32.*model\.float\(\)"):
        export_model(model.half(), tmp_path / "m.onnx")
    model.float()
    bypass(model.bert.encoder.layer[0])
    with pytest.raises(ExportError, match=r"switched off: bert\.encoder\.layer\.0"):
        export_model(model, tmp_path / "m.onnx")
    other, _ = tiny("bert")
    monkeypatch.setattr("hf_prune.conversion.export._TOLERANCE", 0.0)
    with pytest.raises(ExportError, match="differ from PyTorch's by"):
        export_model(other, tmp_path / "m.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"onnx, onnxscript, onnxruntime is not installed: pip install"):
        export_model(other, tmp_path / "m.onnx")
    assert not os.listdir(tmp_path)
    monkeypatch.undo()
    with pytest.raises(DataError, match="does not exist"):
        ExportedModel(tmp_path / "nothing.onnx")


def test_what_torch_could_not_do_is_said_and_not_where_to_read_on(tmp_path, monkeypatch):
    def refuse(*_, **__):
        try:
            raise ValueError("\naten.nonsense has no decomposition\nMore of it.")
        except ValueError as inner:
            raise RuntimeError(
                "Failed to export.\n\n(Refer to the full stack trace above for more information.)"
            ) from inner

    monkeypatch.setattr("torch.onnx.export", refuse)
    with pytest.raises(ExportError, match=r"cannot export this \w+: aten.nonsense has no decomposition$"):
        export_model(tiny("bert")[0], tmp_path / "m.onnx")
    assert not os.listdir(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of what ExecuTorch imports
@pytest.mark.parametrize("model_type", ["bert", *(pytest.param(k, marks=pytest.mark.matrix) for k in ("llama", "vit"))])
def test_executorch_programs_do_what_pytorch_does(model_type, tmp_path, capsys):
    pytest.importorskip("executorch", reason="executorch is not installed, which writes and runs .pte files")
    model, inputs = tiny(model_type)
    prune(model, 0.5, granularity=("head", "neuron"))
    shrink(model)
    model.save_pretrained(tmp_path / "model")
    assert exit_code("export", tmp_path / "model", tmp_path / "m.pte", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["runtime"] == "executorch"
    assert report["difference"] < 1e-5
    names = json.loads((tmp_path / "m.pte.json").read_text())["inputs"]
    assert {name: sizes[0] for name, sizes in names.items()} == dict.fromkeys(
        inputs(), 1 if model_type == "llama" else 8
    )
    exported = ExportedModel(tmp_path / "m.pte", threads=1)
    given = {k: v[:1, 2:] if model_type == "llama" else v[:1] for k, v in inputs().items()}
    turned = dict(reversed(given.items()))  # by name, in any order
    assert abs(exported(**turned) - logits(model, given)).max() < 1e-5
    with pytest.raises(DataError, match=r"m\.pte was given inputs of shapes .*\[9, .*: expected at most .*\[[18], "):
        exported(**{name: value.repeat(9, *[1] * (value.dim() - 1))[:9] for name, value in given.items()})
    with pytest.raises(DataError, match=r"shapes \{\}: expected at most"):
        exported()
    if model_type == "bert":
        command = ("bench", tmp_path / "model", tmp_path / "m.pte", "--length", "8", "--rounds", "3", "--json")
        assert exit_code(*command) == 0
        assert [p["model"] for p in json.loads(capsys.readouterr().out)["points"]] == ["model", "m.pte"]
    (tmp_path / "m.pte.json").unlink()
    with pytest.raises(DataError, match=r"m\.pte\.json.*what export_model\(\) writes beside a \.pte file"):
        ExportedModel(tmp_path / "m.pte")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("model_type", ["t5", pytest.param("gpt2", marks=pytest.mark.matrix)])
def test_executorch_programs_leave_the_model_and_return_the_first_output(model_type, tmp_path):
    pytest.importorskip("executorch", reason="executorch is not installed, which writes and runs .pte files")
    model, _ = tiny(model_type)
    before = [p.requires_grad for p in model.parameters()]
    attributes = vars(model).keys() - {"training"}
    report = export_model(model, tmp_path / "m.pte")
    assert report.difference < 1e-5
    assert [p.requires_grad for p in model.parameters()] == before
    assert vars(model).keys() - {"training"} == attributes


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_executorch_programs_read_as_many_tokens_as_the_model(tmp_path):
    pytest.importorskip("executorch", reason="executorch is not installed, which writes and runs .pte files")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=30, max_position_embeddings=20, pad_token_id=1, **sizes)  # two before the first
    model = RobertaForSequenceClassification(config).eval()
    export_model(model, tmp_path / "m.pte")
    ids = torch.randint(3, 30, (8, 18))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert abs(ExportedModel(tmp_path / "m.pte")(**given) - logits(model, given)).max() < 1e-5


def test_executorch_programs_without_int8_caches_and_their_package(tmp_path, monkeypatch):
    model, _ = tiny("llama")
    with pytest.raises(ExportError, match=r"m\.pte cannot be written with int8 weights: leave quantize"):
        export_model(model, tmp_path / "m.pte", quantize="int8")
    with pytest.raises(ExportError, match=r"m\.pte cannot have a key-value cache: leave cache=True"):
        export_model(model, tmp_path / "m.pte", cache=True)
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "executorch" else find(name))
    with pytest.raises(ExportError, match=r"executorch is not installed: pip install 'hf_prune\[executorch\]'"):
        export_model(model, tmp_path / "m.pte")
    (tmp_path / "m.pte.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"m\.pte\.json"):
        export_model(model, tmp_path / "m.pte")
    assert os.listdir(tmp_path) == ["m.pte.json"]
