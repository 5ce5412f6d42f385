"""describe_units() and `hf-prune inspect`: counts that are known from the config, and refusals with their reason."""

import json

import torch
import transformers
from typer.testing import CliRunner

from hf_prune import describe_units, prune, shrink
from hf_prune.cli.main import app
from tests.models import tiny_bert, tiny_resnet

_MODERN = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 96}


def modernbert(**settings):
    return transformers.ModernBertConfig(vocab_size=100, pad_token_id=0, cls_token_id=1, sep_token_id=2, **settings)


def test_a_model_of_the_table():
    with torch.device("meta"):
        description = describe_units(transformers.BertForMaskedLM(transformers.BertConfig()))
    assert [(p.kind, p.units, p.origin) for p in description.units] == [
        ("head", (12,) * 12, "from the table"),
        ("neuron", (3072,) * 12, "from the table"),
    ]
    # three projections of 768 x 768 with biases, and the output projection without one
    assert description.units[0].parameters == 12 * (4 * 768 * 768 + 3 * 768)
    assert description.layers == {"encoder.layer": (12, 11)}
    assert description.embeddings["bert.embeddings.word_embeddings"] == (30522, 768)
    assert description.tied[0] == ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
    assert description.parameters == 109_514_298
    assert not description.refused


def test_a_model_that_is_found_and_proven():
    with torch.device("meta"):
        description = describe_units(transformers.ModernBertModel(modernbert()))
    heads, neurons = description.units
    assert (heads.kind, heads.name, set(heads.units), heads.origin) == (
        "head",
        "layers.*.attn.Wo",
        {12},
        "found and proven",
    )
    assert (neurons.kind, set(neurons.units), neurons.config) == ("neuron", {1152}, ("intermediate_size",))
    assert neurons.parameters == 22 * 3 * 768 * 1152
    text = str(description)
    assert "layers: 22 layers; up to 21 of them can be removed" in text
    assert "found and proven" in text
    assert json.loads(description.to_json())["units"][1]["units"] == [1152] * 22


def test_sizes_of_a_shrunk_model():
    model = shrink(prune(tiny_bert(), 0.5, granularity="neuron", criterion="magnitude", scope="global"))
    (neurons,) = (place for place in describe_units(model).units if place.kind == "neuron")
    assert neurons.units == tuple(layer.output.dense.in_features for layer in model.bert.encoder.layer)
    assert describe_units(tiny_resnet()).units[0].kind == "channel"


def test_what_cannot_be_removed_says_why():
    config = transformers.BloomConfig(vocab_size=60, hidden_size=64, n_head=4, n_layer=2)
    description = describe_units(transformers.BloomModel(config))
    assert "the code does not run without them" in description.refused["h.0.self_attention.dense"]
    assert "Not removable:" in str(description)
    bit = transformers.BitConfig(embedding_size=32, hidden_sizes=[32], depths=[1], num_groups=8)
    description = describe_units(transformers.BitModel(bit))
    assert not description.units
    assert "nothing was found that can be removed" in description.refused["BitModel"]


def test_the_command_reads_the_config_alone(tmp_path):
    modernbert(**_MODERN).save_pretrained(tmp_path / "config")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "config"), "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert (values["model"], values["model_type"]) == ("ModernBertModel", "modernbert")
    assert [(place["kind"], place["units"]) for place in values["units"]] == [("head", [4] * 4), ("neuron", [96] * 4)]
    assert values["units"][0]["origin"] == "found and proven"


def test_the_command_in_a_process_of_its_own(tmp_path, fresh_process):
    modernbert(**_MODERN).save_pretrained(tmp_path)
    done = fresh_process.run("import sys; from hf_prune.cli.main import main; main(['inspect', sys.argv[1]])", tmp_path)
    assert "found and proven" in done.stdout, done.stderr


def test_the_command_knows_the_sizes_of_a_shrunk_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = transformers.ModernBertForMaskedLM(modernbert(**_MODERN))
    shrink(prune(model, 0.5, granularity=("head", "neuron"), criterion="magnitude", scope="global"))
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert str(describe_units(model)) in result.stdout
