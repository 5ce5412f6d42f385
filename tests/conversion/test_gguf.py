"""llama.cpp computes from a GGUF file what PyTorch computes from the model, whatever was cut out of it."""

import json
import os

import pytest
import torch
import transformers
from tokenizers.models import WordLevel

from hf_prune import CheckpointError, ExportError, export_gguf, export_model, prune, shrink
from hf_prune.cli.commands import export as command
from hf_prune.cli.main import main
from hf_prune.conversion.gguf import layout, write
from tests.small_tokenizers import CHAT, byte_level, sentencepiece

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'hf_prune[gguf]'")
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install 'hf_prune[gguf]'")

SCALED = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level("qwen2")


def model_of(family, **settings):
    own = {
        "vocab_size": 304,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**{**own, **settings})
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for name, parameter in model.named_parameters():
            spread = 0.3 if "norm" in name or name.endswith("bias") else 0.15
            parameter.data.add_(spread * torch.randn_like(parameter))
    return model


def cut(model, layer, heads=None, neurons=None):
    """Keep the first groups of heads and the first neurons of a layer."""
    block = model.model.layers[layer]
    attention, ffn = block.self_attn, block.mlp

    def rows(linear, count):
        linear.weight = torch.nn.Parameter(linear.weight[:count].clone())
        if linear.bias is not None:
            linear.bias = torch.nn.Parameter(linear.bias[:count].clone())

    def columns(linear, count):
        linear.weight = torch.nn.Parameter(linear.weight[:, :count].clone())

    if heads is not None:
        size, group = attention.head_dim, attention.num_key_value_groups
        rows(attention.q_proj, heads * group * size)
        rows(attention.k_proj, heads * size)
        rows(attention.v_proj, heads * size)
        columns(attention.o_proj, heads * group * size)
    if neurons is not None:
        rows(ffn.gate_proj, neurons)
        rows(ffn.up_proj, neurons)
        columns(ffn.down_proj, neurons)


@pytest.mark.parametrize(
    ("family", "cuts", "settings", "architecture"),
    [
        ("Llama", {}, {"tie_word_embeddings": True}, "llama"),
        ("Llama", {}, {"attention_bias": True, "mlp_bias": True, "head_dim": 16}, "llama"),
        ("Llama", {1: (2, 33)}, {"attention_bias": True, "mlp_bias": True}, "deci"),
        ("Llama", {0: (0, None), 1: (None, 0), 2: (0, 5)}, {}, "deci"),
        ("Llama", {0: (0, 0)}, {}, "llama"),
        ("Mistral", {0: (3, 40), 1: (3, 40), 2: (3, 40)}, {"sliding_window": 128}, "llama"),
        ("Mistral", {0: (2, None)}, {}, "deci"),
        ("Qwen2", {}, {}, "qwen2"),
        ("Qwen2", {0: (3, 40), 1: (3, 40), 2: (3, 40)}, {}, "deci"),
        ("Qwen2", {0: (0, None), 1: (2, None)}, {}, "deci"),
        ("Qwen3", {0: (3, 40), 1: (3, 40), 2: (3, 40)}, {}, "qwen3"),
    ],
)
def test_llama_cpp_computes_the_same(family, cuts, settings, architecture, tokenizer, tmp_path):
    model = model_of(family, **settings)
    for layer, (heads, neurons) in cuts.items():
        cut(model, layer, heads, neurons)
    report = export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="f32")
    assert report.architecture == architecture
    assert report.difference < 1e-4
    assert report.same_text
    assert report.tokens > 3
    assert os.listdir(tmp_path) == ["m.gguf"]


@pytest.mark.parametrize(("family", "kind"), [("Llama", "linear"), ("Llama", "llama3"), ("Qwen2", "yarn")])
def test_scaled_rotary_embeddings(family, kind, tokenizer, tmp_path):
    rope = {"rope_theta": 10000.0, "rope_type": kind, **SCALED[kind]}
    model = model_of(family, rope_parameters=rope)
    assert export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="f32").difference < 1e-4


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "sentencepiece", "sentencepiece without <s>"])
def test_tokenizers(kind, tmp_path):
    spm = kind.startswith("sentencepiece")
    tokenizer = sentencepiece(first=kind == "sentencepiece") if spm else byte_level(kind)
    model = model_of("Llama", vocab_size=len(tokenizer) + 3)  # rows without a token
    assert export_gguf(model, tokenizer, tmp_path / "m.gguf", dtype="f32").difference < 1e-4
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents()[-1] == f"[PAD{len(tokenizer) + 2}]"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is (kind == "sentencepiece")
    if not spm:
        assert fields["tokenizer.ggml.pre"].contents() == kind
        assert fields["tokenizer.chat_template"].contents() == CHAT
        assert fields["tokenizer.ggml.eos_token_id"].contents() == 0


def test_types_and_zeros(tokenizer, tmp_path):
    model = prune(model_of("Llama"), 0.5)
    sizes = {}
    for dtype in ("f32", "f16", "bf16", "q8_0"):
        report = export_gguf(model, tokenizer, tmp_path / f"{dtype}.gguf", dtype=dtype)
        sizes[dtype] = report.size
        assert report.difference < {"f32": 1e-4, "f16": 0.02, "bf16": 0.2, "q8_0": 0.5}[dtype]
        for tensor in gguf.GGUFReader(report.path).tensors:
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            if "ffn_up" in tensor.name:
                expected = model.model.layers[int(tensor.name.split(".")[1])].mlp.up_proj.weight
                assert torch.equal(values[:48] == 0, expected == 0) or dtype == "q8_0"
                assert (values[:48][expected == 0] == 0).all()
                assert len(values) == (64 if dtype == "q8_0" else 48)
                assert not values[48:].any()
    assert report.added_neurons == 48
    assert "with 48 neurons more that are all zero" in str(report)
    assert sizes["f32"] > 1.8 * sizes["f16"] > 1.8 * sizes["q8_0"]
    assert sizes["f16"] == sizes["bf16"]
    odd = export_gguf(model_of("Llama", hidden_size=80), tokenizer, tmp_path / "odd.gguf", dtype="q8_0")
    assert odd.not_quantized
    assert "not multiples of 32 and stay in f16" in str(odd)


def test_what_was_pruned_by_units_is_exported_through_the_command(tmp_path, capsys):
    model = model_of("Llama")
    prune(model, 0.4, granularity=("head", "neuron"), scope="global")
    shrink(model)
    sizes = {tuple(block.mlp.down_proj.weight.shape) for block in model.model.layers}
    assert len(sizes) > 1
    model.save_pretrained(tmp_path / "model")
    words = ["export", str(tmp_path / "model"), str(tmp_path / "m.gguf"), "--gguf-type", "f32", "--json"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    assert "has no tokenizer, which a GGUF file holds" in capsys.readouterr().err
    byte_level().save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert report["architecture"] == "deci"
    assert report["difference"] < 1e-4
    with pytest.raises(SystemExit) as ended:
        main(words[:-3])
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path / "model"), str(tmp_path / "m.onnx"), "--gguf-type", "f32"])
    assert "--gguf-type is for FILE.gguf" in capsys.readouterr().err
    assert command._TYPES == tuple(write.GGUF_TYPES)


def test_refusals_write_nothing(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"

    def refused(model, match, tokenizer=tokenizer, **settings):
        with pytest.raises(ExportError, match=match):
            export_gguf(model, tokenizer, path, **settings)
        assert not os.listdir(tmp_path)

    qwen3 = model_of("Qwen3")
    cut(qwen3, 1, 2)
    refused(qwen3, "'deci', has no norms of queries and keys")
    refused(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2)), "found a GPT2LMHead")
    refused(model_of("Llama", hidden_act="relu"), "found the activation 'relu'")
    dynamic = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}
    refused(model_of("Llama", rope_parameters=dynamic), "scaled by 'dynamic'")
    llama3 = {"rope_theta": 10000.0, "rope_type": "llama3", **SCALED["llama3"]}
    refused(model_of("Qwen2", rope_parameters=llama3), "scaled by 'llama3'")
    partial = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
    model = model_of("Llama")
    model.config.rope_parameters = partial
    refused(model, "only a part of each head is rotated")
    bias = model_of("Llama", attention_bias=True)
    cut(bias, 1, 0)
    refused(bias, "still adds a bias")
    empty = model_of("Llama")
    for layer in range(3):
        cut(empty, layer, 0, 0)
    refused(empty, "no layers with heads or neurons")
    model = model_of("Llama")
    model.model.layers[1].self_attn.scaling = 1.0
    refused(model, "attention is scaled by 1")
    model = model_of("Llama")
    model.model.extra = torch.nn.Linear(2, 2)
    refused(model, r"no place for model\.extra\.weight")
    model = model_of("Llama")
    refused(model, "found the type 'q4_0'", dtype="q4_0")
    refused(model_of("Llama", vocab_size=100), "a token number 299, and the model 100 embeddings")
    model.model.norm.weight.data.fill_(1)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    refused(model, r"blk\.0\.ffn_up\.weight has a weight of 1e\+05, beyond float16")
    assert model.training is False

    model = model_of("Llama", vocab_size=500)
    words = byte_level()
    words.backend_tokenizer.model = WordLevel({"a": 0}, unk_token="a")
    refused(model, "type WordLevel: expected BPE", words)
    other = byte_level()
    other.backend_tokenizer.pre_tokenizer = byte_level("qwen2").backend_tokenizer.pre_tokenizer
    other.backend_tokenizer.model.ignore_merges = True
    refused(model, "no name that we know for a tokenizer with the steps", other)
    refused(model, "merges whatever forms a token", sentencepiece(400, every_way=False))

    monkeypatch.setattr(layout, "_ADJACENT_PAIRS", ())
    refused(model_of("Llama"), "differ from PyTorch's by", dtype="f32")
    monkeypatch.undo()
    path.write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        export_gguf(model, tokenizer, path)
    assert path.read_text() == "mine"
    assert export_gguf(model_of("Llama"), tokenizer, path, overwrite=True).size == path.stat().st_size
    with pytest.raises(ExportError, match=r"expected \.gguf"):
        export_gguf(model, tokenizer, tmp_path / "m.bin")
    with pytest.raises(ExportError, match=r"export_gguf"):
        export_model(model, tmp_path / "m.gguf", overwrite=True)


def test_without_the_packages(tokenizer, tmp_path, monkeypatch):
    model = model_of("Llama")
    monkeypatch.setattr(write, "can_compare", lambda: False)
    report = export_gguf(model, tokenizer, tmp_path / "m.gguf")
    assert report.difference is None
    assert "It was not compared with PyTorch: pip install xllamacpp" in str(report)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"gguf is not installed: pip install 'hf_prune\[gguf\]'"):
        export_gguf(model, tokenizer, tmp_path / "n.gguf")
    assert os.listdir(tmp_path) == ["m.gguf"]


def test_models_in_bfloat16_with_few_positions_are_compared_in_float32(tokenizer, tmp_path):
    model = model_of("Llama", max_position_embeddings=20)
    model.config._name_or_path = "/home/me/own/model"
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    before = {name: (value.dtype, value.data_ptr()) for name, value in model.named_parameters()}
    report = export_gguf(model, tokenizer, tmp_path / "m.gguf")
    assert report.difference < 0.02
    assert report.tokens <= 10
    assert before == {name: (value.dtype, value.data_ptr()) for name, value in model.named_parameters()}
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["general.name"].contents() == "model"


def test_a_failed_assertion_of_llama_cpp_is_an_error(tokenizer, tmp_path, monkeypatch):
    model = model_of("Llama", vocab_size=303)
    own = byte_level("qwen2")
    own.add_tokens(["[PAD301]"])
    assert export_gguf(model, own, tmp_path / "m.gguf", dtype="f32").difference < 1e-4
    tokens = gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert tokens[300:] == ["[PAD301]", "[[PAD301]]", "[PAD302]"]
    monkeypatch.setattr("hf_prune.conversion.gguf.vocabulary._unused_name", lambda number, taken: "[PAD301]")
    with pytest.raises(ExportError, match=r"llama.cpp ended with code -6 on the exported model .*nothing was written"):
        export_gguf(model, own, tmp_path / "n.gguf")
    assert os.listdir(tmp_path) == ["m.gguf"]
